"""Windows of a streamed split: the images of some steps, decoded while the device is busy.

A split too large for memory reaches the device a window at a time: the rows of the next steps,
each decoded once, with the steps' rows renumbered to places in the window. Every host makes the
windows of its own rows, so that it decodes nothing that another host trains on.
"""

import numpy as np

from hamu_jax.data.batching import PADDING
from hamu_jax.data.encoded import EncodedImages


def window(
  images: np.ndarray | EncodedImages, rows: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Decodes the images of some steps.

  Args:
    images: [N, H, W, C] uint8, or encoded ones.
    rows: [...] int32 rows of `images`, -1 for padding; a row may occur many times.
    capacity: M, room for so many distinct rows: the window's static shape.

  Returns:
    images_MxHxWxC: uint8, each distinct row once in ascending order, black beyond them.
    local: [...] int32, in the shape of `rows`: where in the window each row is, -1 for padding.
    rows_M: int32, the row that each place of the window holds, which keys its augmentation; -1
      beyond them.

  Raises:
    ValueError: if there are more than `capacity` distinct rows.
  """
  distinct = np.unique(rows[rows >= 0])
  if len(distinct) > capacity:
    raise ValueError(f"{len(distinct)} distinct rows do not fit a window of {capacity}")
  images_MxHxWxC = np.zeros((capacity, *images.shape[1:]), np.uint8)
  images_MxHxWxC[: len(distinct)] = images[distinct]
  rows_M = np.full(capacity, PADDING, np.int32)
  rows_M[: len(distinct)] = distinct
  local = np.where(rows >= 0, np.searchsorted(distinct, rows), PADDING)
  return images_MxHxWxC, local.astype(np.int32), rows_M
