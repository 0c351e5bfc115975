"""Gathering, normalising and augmenting batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.data import AUGMENTATIONS, augment, device, example_keys, normalize, take
from hamu_jax.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(1, 256, (20, 6, 5, 3), dtype=np.uint8)
LABELS = RNG.integers(0, 4, 20, dtype=np.int32)
_augment = jax.jit(augment, static_argnums=2)


def test_take_gathers_rows_and_masks_padding():
  indices = jnp.array([[7, 0, -1], [19, 7, -1]], jnp.int32)
  batch = jax.jit(take)(IMAGES, LABELS, indices)
  np.testing.assert_array_equal(batch["mask"], [[True, True, False]] * 2)
  np.testing.assert_array_equal(batch["image"][:, :2], IMAGES[[[7, 0], [19, 7]]])
  np.testing.assert_array_equal(batch["label"][:, :2], LABELS[[[7, 0], [19, 7]]])
  np.testing.assert_array_equal(batch["index"], indices)
  assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
  # The reference pads with label -1, which a one-hot or a gather reads as the last class.
  assert (batch["label"] >= 0).all()


def test_take_maps_over_a_leading_axis():
  indices = jnp.array([[3, -1], [5, 6]])
  mapped = jax.vmap(take, in_axes=(None, None, 0))(jnp.array(IMAGES), jnp.array(LABELS), indices)
  for key, value in take(jnp.array(IMAGES), jnp.array(LABELS), indices).items():
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


def _keys(indices):
  return example_keys(jax.random.key(3), jnp.array(indices))


def test_keys_follow_the_row_and_the_step():
  keys = jax.random.key_data(_keys([4, -1, 9, 4]))
  np.testing.assert_array_equal(keys[0], keys[3])
  assert len({tuple(key.tolist()) for key in keys}) == 3
  other = jax.random.key_data(example_keys(jax.random.key(4), jnp.array([4])))
  assert (other[0] != keys[0]).any()


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_augmentation_of_an_example_does_not_depend_on_its_batch(kind):
  whole = np.asarray(_augment(jnp.array(IMAGES), _keys(np.arange(20)), kind))
  other = np.array([8, -1, 11, 2, 17, 5, -1])
  among = np.asarray(_augment(jnp.array(IMAGES[other]), _keys(other), kind))
  np.testing.assert_array_equal(among[other >= 0], whole[other[other >= 0]])


def test_none_changes_nothing():
  np.testing.assert_array_equal(_augment(jnp.array(IMAGES), _keys(np.arange(20)), "none"), IMAGES)


def test_flip_mirrors_about_half_of_the_images():
  indices = np.arange(2000)
  images = jnp.array(IMAGES[indices % 20])
  result = np.asarray(_augment(images, _keys(indices), "flip"))
  kept = (result == images).all((1, 2, 3))
  mirrored = (result == images[:, :, ::-1]).all((1, 2, 3))
  assert (kept ^ mirrored).all()
  assert 900 < kept.sum() < 1100


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_crop_flip_takes_every_window_of_the_framed_image(dtype):
  indices = np.arange(3000)
  image = IMAGES[0].astype(dtype)
  images = jnp.broadcast_to(jnp.array(image), (3000, *image.shape))
  result = np.asarray(_augment(images, _keys(indices), "crop_flip"))
  assert result.dtype == dtype
  framed = np.pad(image, ((4, 4), (4, 4), (0, 0)))
  windows = np.array([framed[i : i + 6, j : j + 5] for i in range(9) for j in range(9)])
  windows = np.concatenate([windows, windows[:, :, ::-1]]).reshape(162, -1)
  same = (result.reshape(3000, 1, -1) == windows).all(-1)
  assert same.any(1).all()
  assert same.any(0).all()


def test_a_box_that_is_the_image_leaves_it():
  for images in (IMAGES, IMAGES.astype(np.float32)):
    result = device.resize_box(jnp.array(images[0]), jnp.array([0, 0]), jnp.array([6, 5]))
    assert result.dtype == images.dtype
    np.testing.assert_array_equal(result, images[0])


def test_an_enlarged_box_keeps_ramps():
  height, width, corner, size = 24, 30, np.array([5, 9]), np.array([12, 10])
  y, x = np.mgrid[:height, :width].astype(np.float32)
  image = jnp.array(np.stack([y, x], axis=-1))
  result = jax.jit(device.resize_box)(image, jnp.array(corner), jnp.array(size))
  # Output pixel i lies at corner + (i + 1/2) size / length - 1/2 of the input.
  y = corner[0] + (np.arange(height) + 0.5) * size[0] / height - 0.5
  x = corner[1] + (np.arange(width) + 0.5) * size[1] / width - 0.5
  np.testing.assert_allclose(result[..., 0], np.tile(y[:, None], (1, width)), atol=1e-4)
  np.testing.assert_allclose(result[..., 1], np.tile(x[None], (height, 1)), atol=1e-4)


def test_boxes_are_distributed_as_torchvision_draws_them_and_lie_within():
  height, width, count = 48, 60, 4000
  draw = jax.jit(jax.vmap(lambda key: device.random_box(key, height, width)))
  corners, sizes = (np.asarray(values) for values in draw(_keys(np.arange(count))))
  assert (corners >= 0).all() and (corners + sizes <= [height, width]).all()
  for axis, length in enumerate((height, width)):
    far = corners[:, axis] + sizes[:, axis] == length
    assert (corners[:, axis] == 0).any() and (far & (corners[:, axis] > 0)).any()
  # Its documented rule, drawn until a box fits, ten times at most, else the whole image.
  rng = np.random.default_rng(1)
  area = height * width * rng.uniform(0.08, 1, (10, count))
  aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), (10, count)))
  drawn = np.round(np.sqrt([area / aspect, area * aspect])).transpose(1, 2, 0)
  expected = np.tile([[float(height), width]], (count, 1))
  for box in drawn[::-1]:
    fits = (box <= [height, width]).all(1)
    expected[fits] = box[fits]
  quantiles = (0, 0.1, 0.5, 0.9, 1)
  for measure in (lambda h, w: h * w / (height * width), lambda h, w: w / h):
    got, reference = measure(*sizes.T), measure(*expected.T)
    np.testing.assert_allclose(np.quantile(got, quantiles), np.quantile(reference, quantiles), atol=0.04)


def test_a_random_resized_crop_is_one_of_its_boxes_and_maybe_mirrored():
  indices = np.arange(300)
  image = jnp.array(RNG.uniform(0, 255, (8, 8, 3)), jnp.float32)
  images = jnp.broadcast_to(image, (300, 8, 8, 3))
  result = np.asarray(_augment(images, _keys(indices), "random_resized_crop"))

  @jax.jit
  @jax.vmap
  def boxed(key):
    return device.resize_box(image, *device.random_box(jax.random.split(key)[0], 8, 8))

  expected = np.asarray(boxed(_keys(indices)))
  kept = np.isclose(result, expected, atol=1e-3).all((1, 2, 3))
  mirrored = np.isclose(result, expected[:, :, ::-1], atol=1e-3).all((1, 2, 3))
  assert (kept ^ mirrored).all()
  assert 110 < kept.sum() < 190
  assert 0 <= result.min() and result.max() <= 255


@pytest.mark.parametrize("kind", ["crop_flip", "random_resized_crop"])
def test_augmentation_draws_the_same_in_64_bit_mode(kind):
  indices = np.arange(20)
  expected = np.asarray(_augment(jnp.array(IMAGES), _keys(indices), kind))
  with jax.enable_x64(True):
    result = _augment(jnp.array(IMAGES), _keys(indices.astype(np.int32)), kind)
  np.testing.assert_array_equal(result, expected)


def test_unknown_augmentation():
  with pytest.raises(UserError, match="choose from none, flip, crop_flip, random_resized_crop"):
    augment(jnp.array(IMAGES), _keys(np.arange(20)), "cutout")
