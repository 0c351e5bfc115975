"""Windows of a streamed split: the rows, the renumbering, the shards; and the background thread."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from hamu_jax.data import window

IMAGES = np.arange(40 * 2 * 3 * 1, dtype=np.uint8).reshape(40, 2, 3, 1)


class _Counting:
  """Images that record which rows are decoded."""

  shape = IMAGES.shape

  def __init__(self):
    self.decoded = []

  def __getitem__(self, rows):
    self.decoded += rows.tolist()
    return IMAGES[rows]


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(rows=st.lists(st.integers(-1, 39), min_size=6, max_size=24), spare=st.integers(0, 5))
def test_a_window_holds_what_its_rows_name(rows, spare):
  rows = np.array(rows[: len(rows) // 6 * 6], np.int32).reshape(-1, 2, 3)
  images = _Counting()
  distinct = sorted(set(rows[rows >= 0].tolist()))
  capacity = len(distinct) + spare
  held, local, ids = window(images, rows, capacity)
  assert images.decoded == distinct
  assert held.shape == (capacity, 2, 3, 1) and held.dtype == np.uint8
  assert local.shape == rows.shape and local.dtype == ids.dtype == np.int32
  np.testing.assert_array_equal(local < 0, rows < 0)
  present = rows >= 0
  np.testing.assert_array_equal(held[local[present]], IMAGES[rows[present]])
  np.testing.assert_array_equal(ids[local[present]], rows[present])
  np.testing.assert_array_equal(ids[len(distinct) :], -1)
  assert not held[len(distinct) :].any()


def test_a_window_that_is_too_small_is_refused():
  with pytest.raises(ValueError, match="3 distinct rows do not fit a window of 2"):
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
