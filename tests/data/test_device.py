"""Gathering, normalising and augmenting batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.data import AUGMENTATIONS, augment, example_keys, normalize, take
from hamu_jax.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(1, 256, (20, 6, 5, 3), dtype=np.uint8)
LABELS = RNG.integers(0, 4, 20, dtype=np.int32)
_augment = jax.jit(augment, static_argnums=2)


def test_take_gathers_rows_and_masks_padding():
  rows = jnp.array([[7, 0, -1], [19, 7, -1]], jnp.int32)
  batch = jax.jit(take)(IMAGES, LABELS, rows)
  np.testing.assert_array_equal(batch["mask"], [[True, True, False]] * 2)
  np.testing.assert_array_equal(batch["image"][:, :2], IMAGES[[[7, 0], [19, 7]]])
  np.testing.assert_array_equal(batch["label"][:, :2], LABELS[[[7, 0], [19, 7]]])
  np.testing.assert_array_equal(batch["row"], rows)
  assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
  # The reference pads with label -1, which a one-hot or a gather reads as the last class.
  assert (batch["label"] >= 0).all()


def test_take_maps_over_a_leading_axis():
  rows = jnp.array([[3, -1], [5, 6]])
  mapped = jax.vmap(take, in_axes=(None, None, 0))(jnp.array(IMAGES), jnp.array(LABELS), rows)
  for key, value in take(jnp.array(IMAGES), jnp.array(LABELS), rows).items():
    np.testing.assert_array_equal(mapped[key], value)


@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (2, 4, 6, 5, 3), (6, 5, 3)])
def test_normalize_is_the_formula_in_both_precisions(x64, shape):
  mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
  images = RNG.integers(0, 256, shape, dtype=np.uint8)
  expected = (images / 255 - np.array(mean)) / np.array(std)
  for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.float64, 1e-14)):
    result = jax.jit(lambda x, dtype=dtype: normalize(x, mean, std, dtype))(images)
    assert result.dtype == dtype
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


def test_normalize_refuses_statistics_of_another_channel_count():
  with pytest.raises(UserError, match="config.data.mean=.* has 3 values, .* 1 channel"):
    normalize(IMAGES[..., :1], (0.5,) * 3, (0.5,) * 3)
  with pytest.raises(UserError, match="config.data.std=.* has 1 values, .* 3 channel"):
    normalize(IMAGES, (0.5,) * 3, (0.5,))


def _keys(rows):
  return example_keys(jax.random.key(3), jnp.array(rows))


def test_keys_follow_the_row_and_the_step():
  keys = jax.random.key_data(_keys([4, -1, 9, 4]))
  np.testing.assert_array_equal(keys[0], keys[3])
  assert len({tuple(key.tolist()) for key in keys}) == 3
  other = jax.random.key_data(example_keys(jax.random.key(4), jnp.array([4])))
  assert (other[0] != keys[0]).any()


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_augmentation_of_an_example_does_not_depend_on_its_batch(kind):
  rows = np.array([2, 11, 5, 8])
  alone = _augment(jnp.array(IMAGES[rows]), _keys(rows), kind)
  other = np.array([8, -1, 11, 2, 17, 5, -1])
  among = _augment(jnp.array(IMAGES[other]), _keys(other), kind)
  np.testing.assert_array_equal(among[jnp.array([3, 2, 5, 0])], alone)


def test_none_changes_nothing():
  np.testing.assert_array_equal(_augment(jnp.array(IMAGES), _keys(np.arange(20)), "none"), IMAGES)


def test_flip_mirrors_about_half_of_the_images():
  rows = np.arange(2000)
  images = jnp.array(IMAGES[rows % 20])
  result = np.asarray(_augment(images, _keys(rows), "flip"))
  kept = (result == images).all((1, 2, 3))
  mirrored = (result == images[:, :, ::-1]).all((1, 2, 3))
  assert (kept ^ mirrored).all()
  assert 900 < kept.sum() < 1100


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_crop_flip_takes_every_window_of_the_framed_image(dtype):
  rows = np.arange(3000)
  image = IMAGES[0].astype(dtype)
  images = jnp.broadcast_to(jnp.array(image), (3000, *image.shape))
  result = np.asarray(_augment(images, _keys(rows), "crop_flip"))
  assert result.dtype == dtype
  framed = np.pad(image, ((4, 4), (4, 4), (0, 0)))
  windows = np.array([framed[i : i + 6, j : j + 5] for i in range(9) for j in range(9)])
  windows = np.concatenate([windows, windows[:, :, ::-1]]).reshape(162, -1)
  same = (result.reshape(3000, 1, -1) == windows).all(-1)
  assert same.any(1).all()
  assert same.any(0).all()


def test_augmentation_draws_the_same_in_64_bit_mode():
  rows = np.arange(20)
  expected = np.asarray(_augment(jnp.array(IMAGES), _keys(rows), "crop_flip"))
  with jax.enable_x64(True):
    result = _augment(jnp.array(IMAGES), _keys(rows.astype(np.int32)), "crop_flip")
  np.testing.assert_array_equal(result, expected)


def test_unknown_augmentation():
  with pytest.raises(UserError, match="choose from none, flip, crop_flip"):
    augment(jnp.array(IMAGES), _keys(np.arange(20)), "cutout")
