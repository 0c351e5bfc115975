"""What happens to a batch on the device: gathering, normalising, augmenting. Pure and jittable."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from hamu_jax.errors import UserError

CROP_PADDING = 4
# Defaults of torchvision's RandomResizedCrop.
BOX_AREA = (0.08, 1.0)
BOX_ASPECT = (3 / 4, 4 / 3)
BOX_TRIES = 10


def take(images: jax.Array, labels: jax.Array, indices: jax.Array) -> dict[str, jax.Array]:
  """Gathers a batch from a split in device memory.

  Args:
    images: [N, H, W, C] images of the split.
    labels: [N] class numbers.
    indices: [..., B] integers, -1 for padding. Padding gathers example 0, with a mask of False.

  Returns:
    {"image": [..., B, H, W, C], "label": [..., B], "mask": [..., B] bool, "index": `indices`}.
  """
  mask = indices >= 0
  present = jnp.where(mask, indices, 0)
  return {
    "image": jnp.take(images, present, axis=0),
    "label": jnp.take(labels, present, axis=0),
    "mask": mask,
    "index": indices,
  }


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype=jnp.float32) -> jax.Array:
  """Scales images to (image / 255 - mean) / std.

  Args:
    images: [..., H, W, C], values 0..255.
    mean: C means of pixels scaled to [0, 1].
    std: C standard deviations, on the same scale.
    dtype: type of the result.

  Returns:
    Images of the same shape and of type `dtype`.

  Raises:
    UserError: if `mean` or `std` does not have one value per channel.
  """
  channels = images.shape[-1]
  for field, values in (("mean", mean), ("std", std)):
    if len(values) != channels:
      raise UserError(
        f"config.data.{field}={tuple(values)} has {len(values)} values, but the images have"
        f" {channels} channel(s); give one value per channel"
      )
  shape = (1,) * (images.ndim - 1) + (channels,)
  center, scale = (jnp.asarray(values, dtype).reshape(shape) for values in (mean, std))
  return (images.astype(dtype) / 255 - center) / scale


def example_keys(step_key: jax.Array, indices: jax.Array) -> jax.Array:
  """Derives a key for each example from its index in the dataset.

  So the random draws of an example depend on nothing else in the batch: not on its position, the
  padding, or the device. An example that is in a batch twice gets the same draws twice.

  Args:
    step_key: the key of the step.
    indices: [B] indices of examples in the dataset.

  Returns:
    [B] keys.
  """
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, indices)


def _flip(image_HxWxC: jax.Array, key: jax.Array) -> jax.Array:
  """Mirrors left and right with probability 1/2."""
  # The dtype is explicit, so that 64-bit mode draws the same.
  mirrored = jax.random.randint(key, (), 0, 2, jnp.int32) == 1
  return jnp.where(mirrored, image_HxWxC[:, ::-1], image_HxWxC)


def _crop_flip(image_HxWxC: jax.Array, key: jax.Array) -> jax.Array:
  """Pads the image with black, crops the original size at a random place, then flips."""
  crop_key, flip_key = jax.random.split(key)
  frame = (CROP_PADDING, CROP_PADDING)
  padded = jnp.pad(image_HxWxC, (frame, frame, (0, 0)))
  top, left = jax.random.randint(crop_key, (2,), 0, 2 * CROP_PADDING + 1, jnp.int32)
  window = lax.dynamic_slice(padded, (top, left, jnp.int32(0)), image_HxWxC.shape)
  return _flip(window, flip_key)


def random_box(key: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
  """Draws a box of random area and aspect ratio at a random place in an image.

  The area, as a share of the image's, is uniform in `BOX_AREA`. The logarithm of width over height is
  uniform between the logarithms of `BOX_ASPECT`. The first of `BOX_TRIES` draws that fits is taken; if
  none fits, the box is the whole image.

  Args:
    key: random key of the draw.
    height: height of the image in pixels.
    width: width of the image in pixels.

  Returns:
    (corner, size): [2] int32 each, (top, left) and (height, width).

  Source: torchvision's RandomResizedCrop.
  """
  size_key, corner_key = jax.random.split(key)
  whole = jnp.array([height, width], jnp.int32)
  area_share, aspect_share = jax.random.uniform(size_key, (2, BOX_TRIES), jnp.float32)
  low, high = BOX_AREA
  areas = height * width * (low + (high - low) * area_share)
  low, high = (math.log(aspect) for aspect in BOX_ASPECT)
  aspects = jnp.exp(low + (high - low) * aspect_share)
  sizes = jnp.stack([jnp.sqrt(areas / aspects), jnp.sqrt(areas * aspects)], axis=1)
  sizes = jnp.round(sizes).astype(jnp.int32)
  fits = jnp.all((sizes >= 1) & (sizes <= whole[None]), axis=1)
  size = jnp.where(jnp.any(fits), sizes[jnp.argmax(fits)], whole)
  return jax.random.randint(corner_key, (2,), 0, whole - size + 1, jnp.int32), size


def resize_box(image_HxWxC: jax.Array, corner: jax.Array, size: jax.Array) -> jax.Array:
  """Enlarges a box of an image to the size of the image, bilinearly.

  Args:
    image_HxWxC: image of any type.
    corner: [2] (top, left) of the box.
    size: [2] (height, width) of the box.

  Returns:
    An image of the same shape and type. Within half a pixel of its edges the result uses pixels beyond
    the box, where cropping first would repeat the box's own edge.
  """
  scale = jnp.array(image_HxWxC.shape[:2], jnp.float32) / size
  result = jax.image.scale_and_translate(
    image_HxWxC.astype(jnp.float32),
    image_HxWxC.shape,
    (0, 1),
    scale,
    -corner * scale,
    method="linear",
  )
  if jnp.issubdtype(image_HxWxC.dtype, jnp.integer):
    result = jnp.round(result)
  return result.astype(image_HxWxC.dtype)


def _random_resized_crop(image_HxWxC: jax.Array, key: jax.Array) -> jax.Array:
  """Enlarges a random box to the original size, then flips."""
  box_key, flip_key = jax.random.split(key)
  height, width, _ = image_HxWxC.shape
  return _flip(resize_box(image_HxWxC, *random_box(box_key, height, width)), flip_key)


AUGMENTATIONS = {
  "none": None,
  "flip": _flip,
  "crop_flip": _crop_flip,
  "random_resized_crop": _random_resized_crop,
}


def augment(images: jax.Array, keys: jax.Array, kind: str) -> jax.Array:
  """Augments each image by its own key, before normalisation (the padding of a crop is 0).

  Args:
    images: [B, H, W, C], of any type.
    keys: [B] keys, see `example_keys`.
    kind: "none", "flip" (horizontal, probability 1/2), "crop_flip" (random crop of the image padded by
      `CROP_PADDING` pixels, then flip) or "random_resized_crop" (a `random_box` enlarged to the
      image's size, then flip).

  Returns:
    Images of the same shape and type.

  Raises:
    UserError: for an unknown kind.
  """
  if kind not in AUGMENTATIONS:
    raise UserError(f"augment={kind!r}: choose from {', '.join(AUGMENTATIONS)}")
  augmentation = AUGMENTATIONS[kind]
  if augmentation is None:
    return images
  return jax.vmap(augmentation)(images, keys)
