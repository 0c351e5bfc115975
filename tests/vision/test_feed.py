"""Where the images of a chunk come from: resident or streamed, a step sees the same."""

import jax
import numpy as np
import pytest

from hamu_jax import data
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import pairing, placement
from hamu_jax.paired import Paired
from hamu_jax.vision import feed


class Decoded:
  """Images that count which examples were decoded."""

  def __init__(self, images):
    self._images = images
    self.shape, self.dtype = images.shape, images.dtype
    self.indices = []

  def __len__(self):
    return len(self._images)

  def __getitem__(self, indices):
    self.indices += np.asarray(indices).tolist()
    return self._images[indices]


@pytest.fixture
def images():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (40, 4, 4, 1)).astype(np.uint8)


def feed_data(images):
  return feed.ImageData(
    images, np.arange(40, dtype=np.int32), np.arange(40) >= 30, np.arange(40, dtype=np.int32)
  )


@pytest.fixture
def plan():
  split = Paired(np.arange(30), np.arange(30, 40))
  return data.unlearning_plan(split, "paired", batch_size=7, seed=0, shuffle="each_epoch")


def gathered(data_, indices):
  """What a step would gather by these examples."""
  indices = np.asarray(indices)
  present = np.maximum(indices, 0)
  return np.where(indices >= 0, np.asarray(data_.ids)[present], -1), np.asarray(data_.images)[present]


@pytest.mark.parametrize("start", [0, 3])
def test_a_window_gathers_what_the_whole_split_does(images, plan, start):
  resident, batches = feed.ResidentImages(feed_data(images)).chunk(plan, start, start + 3, None)
  streamed, window_feed = feed.StreamedImages(feed_data(Decoded(images))).chunk(plan, start, start + 3, None)
  np.testing.assert_array_equal(batches.epoch, window_feed.epoch)
  for indices, local in zip(batches.indices, window_feed.indices, strict=True):
    (ids, pictures), (wanted_ids, wanted) = gathered(streamed, local), gathered(resident, indices)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_array_equal(pictures[ids >= 0], wanted[ids >= 0])
  np.testing.assert_array_equal(
    np.asarray(streamed.forget)[np.asarray(window_feed.indices.forget[0])], np.ones(7, bool)
  )


@pytest.mark.parametrize("groups", [1, 2])
def test_each_device_gets_the_images_of_its_own_rows(images, plan, groups):
  mesh = pairing.make_mesh(jax.devices()[:4], groups)
  sharded = pairing.shard_indices(plan.indices(0, 2), mesh)
  streamed, batches = feed.StreamedImages(feed_data(Decoded(images))).chunk(plan, 0, 2, mesh)
  for device in jax.devices()[:4]:
    (ids,) = [shard.data for shard in streamed.ids.addressable_shards if shard.device == device]
    (indices,) = [shard.data for shard in batches.indices.addressable_shards if shard.device == device]
    (role,), (shard,), _ = (axis.tolist() for axis in np.nonzero(mesh.devices == device))
    wanted = sharded[:, :, shard] if groups == 1 else sharded[:, role : role + 1, shard]
    local = np.asarray(indices)[:2, :, 0]
    got = np.where(local >= 0, np.asarray(ids)[0, 0][np.maximum(local, 0)], -1)
    np.testing.assert_array_equal(got, wanted)
    assert set(np.asarray(ids)[0, 0]) - {-1} == set(wanted[wanted >= 0].tolist())


def test_the_next_window_is_decoded_ahead_and_used(images, plan):
  lazy = Decoded(images)
  streamed = feed.StreamedImages(feed_data(lazy))
  streamed.chunk(plan, 0, 2, None)
  streamed._worker.submit(lambda: None).result()
  seen = list(lazy.indices)
  data_, batches = streamed.chunk(plan, 2, 4, None)
  ids, _ = gathered(data_, batches.indices.retain[:2])
  np.testing.assert_array_equal(ids, plan.indices(2, 4).retain)
  wanted = np.concatenate(plan.indices(2, 4))
  assert set(wanted[wanted >= 0].tolist()) <= set(seen)


def test_rows_are_padded_to_the_chunk():
  indices = Paired(np.ones((3, 5), np.int32), None)
  placed = placement.place_batches(indices, np.zeros(3, np.int32), None).indices
  assert placed.forget is None
  assert placed.retain.shape == (chunk_lib.CHUNK_CAPACITY, 5)
  assert int((placed.retain == -1).all(axis=1).sum()) == chunk_lib.CHUNK_CAPACITY - 3


def test_placing_on_a_mesh_replicates():
  mesh = pairing.make_mesh(jax.devices(), 2)
  placed = placement.place({"w": np.arange(3.0)}, mesh)
  assert placed["w"].sharding.is_fully_replicated
  assert len(placed["w"].sharding.device_set) == 4
