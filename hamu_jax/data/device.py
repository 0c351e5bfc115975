"""What happens to a batch on the device: gathering, normalising, augmenting. Pure and jittable."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from hamu_jax.errors import UserError

CROP_PADDING = 4


def take(images: jax.Array, labels: jax.Array, rows: jax.Array) -> dict[str, jax.Array]:
  """Gathers a batch out of a resident split.

  Args:
    images: [N, H, W, C].
    labels: [N].
    rows: [..., B] integers, -1 for padding, which gathers row 0 under a mask of False.

  Returns:
    {"image": [..., B, H, W, C], "label": [..., B], "mask": [..., B] bool, "row": `rows`}.
  """
  mask = rows >= 0
  present = jnp.where(mask, rows, 0)
  return {
      "image": jnp.take(images, present, axis=0),
      "label": jnp.take(labels, present, axis=0),
      "mask": mask,
      "row": rows,
  }


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype=jnp.float32
) -> jax.Array:
  """Scales images to (image / 255 - mean) / std.

  Args:
    images: [..., H, W, C], values 0..255.
    mean: C values, of pixels scaled to [0, 1].
    std: C values.
    dtype: of the result.

  Returns:
    The same shape, of type `dtype`.

  Raises:
    UserError: if `mean` or `std` has not one value a channel.
  """
  channels = images.shape[-1]
  for field, values in (("mean", mean), ("std", std)):
    if len(values) != channels:
      raise UserError(
          f"config.data.{field}={tuple(values)} has {len(values)} values, but the images have"
          f" {channels} channel(s)"
      )
  shape = (1,) * (images.ndim - 1) + (channels,)
  mean, std = (jnp.asarray(values, dtype).reshape(shape) for values in (mean, std))
  return (images.astype(dtype) / 255 - mean) / std


def example_keys(step_key: jax.Array, rows: jax.Array) -> jax.Array:
  """Derives a key for each example from its dataset row.

  What is drawn for an example thus depends on nothing else in the batch: not on its position, the
  padding, or the device. A row that a batch holds twice draws the same twice.

  Args:
    step_key: the key of the step.
    rows: [B] dataset rows.

  Returns:
    [B] keys.
  """
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, rows)


def _flip(image_HxWxC: jax.Array, key: jax.Array) -> jax.Array:
  """Mirrors left and right with probability 1/2."""
  # An explicit dtype, so that 64-bit mode draws the same.
  mirrored = jax.random.randint(key, (), 0, 2, jnp.int32) == 1
  return jnp.where(mirrored, image_HxWxC[:, ::-1], image_HxWxC)


def _crop_flip(image_HxWxC: jax.Array, key: jax.Array) -> jax.Array:
  """Crops the original size at random out of the image framed in black, then flips."""
  crop_key, flip_key = jax.random.split(key)
  frame = (CROP_PADDING, CROP_PADDING)
  padded = jnp.pad(image_HxWxC, (frame, frame, (0, 0)))
  top, left = jax.random.randint(crop_key, (2,), 0, 2 * CROP_PADDING + 1, jnp.int32)
  window = lax.dynamic_slice(padded, (top, left, jnp.int32(0)), image_HxWxC.shape)
  return _flip(window, flip_key)


AUGMENTATIONS = {"none": None, "flip": _flip, "crop_flip": _crop_flip}


def augment(images: jax.Array, keys: jax.Array, kind: str) -> jax.Array:
  """Augments each image by its own key, before normalisation (the frame of a crop is 0).

  Args:
    images: [B, H, W, C], of any type.
    keys: [B] keys, see `example_keys`.
    kind: "none", "flip" (horizontal, probability 1/2) or "crop_flip" (random crop out of a frame
      of `CROP_PADDING` pixels, then flip).

  Returns:
    The same shape and type.

  Raises:
    UserError: for an unknown kind.
  """
  if kind not in AUGMENTATIONS:
    raise UserError(f"augment={kind!r}: choose from {', '.join(AUGMENTATIONS)}")
  if kind == "none":
    return images
  return jax.vmap(AUGMENTATIONS[kind])(images, keys)
