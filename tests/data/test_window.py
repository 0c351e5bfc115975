"""Windows of a streamed split: the examples, the renumbering, the shards; and the background thread."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from hamu_jax.data import window

IMAGES = np.arange(40 * 2 * 3 * 1, dtype=np.uint8).reshape(40, 2, 3, 1)


class _Counting:
  """Images that record which examples are decoded."""

  shape = IMAGES.shape

  def __init__(self):
    self.decoded = []

  def __getitem__(self, indices):
    self.decoded += indices.tolist()
    return IMAGES[indices]


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(indices=st.lists(st.integers(-1, 39), min_size=6, max_size=24), spare=st.integers(0, 5))
def test_a_window_holds_what_its_rows_name(indices, spare):
  indices = np.array(indices[: len(indices) // 6 * 6], np.int32).reshape(-1, 2, 3)
  images = _Counting()
  distinct = sorted(set(indices[indices >= 0].tolist()))
  capacity = len(distinct) + spare
  held, local, ids = window(images, indices, capacity)
  assert images.decoded == distinct
  assert held.shape == (capacity, 2, 3, 1) and held.dtype == np.uint8
  assert local.shape == indices.shape and local.dtype == ids.dtype == np.int32
  np.testing.assert_array_equal(local < 0, indices < 0)
  present = indices >= 0
  np.testing.assert_array_equal(held[local[present]], IMAGES[indices[present]])
  np.testing.assert_array_equal(ids[local[present]], indices[present])
  np.testing.assert_array_equal(ids[len(distinct) :], -1)
  assert not held[len(distinct) :].any()


def test_a_window_that_is_too_small_is_refused():
  with pytest.raises(ValueError, match="3 distinct examples do not fit a window of 2"):
    window(IMAGES, np.array([[4, 5], [-1, 6]], np.int32), 2)


def test_no_host_decodes_another_hosts_rows():
  # Two hosts, each with half of every batch of 8 in an epoch of 5 steps.
  batches = np.random.default_rng(0).permutation(40).astype(np.int32).reshape(5, 8)
  seen = []
  for shard in np.split(batches, 2, axis=1):
    images = _Counting()
    window(images, shard, capacity=shard.size)
    assert sorted(images.decoded) == sorted(shard.ravel().tolist())
    seen.append(set(images.decoded))
  assert not seen[0] & seen[1]
  assert seen[0] | seen[1] == set(range(40))
