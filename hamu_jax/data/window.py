"""Windows of a streamed split: the images of some steps, decoded while the device is busy.

A split that is too large for memory reaches the device one window at a time. A window has the examples of
the next steps, each decoded once, and the steps' indices are renumbered to positions in the window. Every
host makes the windows of its own examples, so that it decodes nothing that another host trains on.
"""

import numpy as np

from hamu_jax.data.batching import PADDING
from hamu_jax.data.encoded import EncodedImages


def window(
  images: np.ndarray | EncodedImages, indices: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Decodes the images of some steps.

  Args:
    images: [N, H, W, C] uint8 images, possibly encoded.
    indices: [...] int32 indices into `images`, -1 for padding; an index may occur many times.
    capacity: M, largest number of distinct examples; it is the window's static shape.

  Returns:
    images_MxHxWxC: uint8, each distinct example once in ascending order of index, then black.
    local: [...] int32, shape of `indices`: position of each example in the window, -1 for padding.
    index_M: int32, index of the example at each position of the window, then -1. It keys the example's
      augmentation.

  Raises:
    ValueError: if there are more than `capacity` distinct examples.
  """
  distinct = np.unique(indices[indices >= 0])
  if len(distinct) > capacity:
    raise ValueError(f"{len(distinct)} distinct examples do not fit a window of {capacity}")
  images_MxHxWxC = np.zeros((capacity, *images.shape[1:]), np.uint8)
  images_MxHxWxC[: len(distinct)] = images[distinct]
  index_M = np.full(capacity, PADDING, np.int32)
  index_M[: len(distinct)] = distinct
  local = np.where(indices >= 0, np.searchsorted(distinct, indices), PADDING)
  return images_MxHxWxC, local.astype(np.int32), index_M
