"""The two feeds of images: all images resident on the device, or a window of images for each chunk.

In both cases a step gathers its batch from `ImageData` by index.
"""

import concurrent.futures
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from hamu_jax import data as data_lib
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.placement import place, place_batches

# Largest number of bytes of the images of a window on a device.
_WINDOW_BYTES = 2**29


class ImageData(NamedTuple):
  """The images that steps gather from.

  Attributes:
    images: [M, H, W, C] uint8 images.
    labels: [M] int32 labels.
    forget: [M] bool, whether an example is to be forgotten.
    ids: [M] int32 indices in the training split.
  """

  images: Any
  labels: Any
  forget: Any
  ids: Any


class ResidentImages:
  """A feed whose images all stay on the device.

  Args:
    data: whole training split.
  """

  sharded = False

  def __init__(self, data: ImageData):
    self._data = data
    self._placed: tuple[Any, ImageData] | None = None

  def prepare(self, plan, total_steps: int) -> None:
    """Does nothing: there is nothing to prepare."""

  def most_steps(self, plan) -> int:
    """The largest number of steps that a chunk may have."""
    del plan
    return chunk_lib.CHUNK_CAPACITY

  def chunk(self, plan, start: int, stop: int, mesh) -> tuple[ImageData, step_lib.Batches]:
    """The data and the batches of the steps start..stop-1 of a plan, on the devices of the mesh."""
    if self._placed is None or self._placed[0] != mesh:
      self._placed = None  # Frees the copy on another mesh first.
      self._placed = (mesh, place(self._data, mesh))
    indices = plan.indices(start, stop)
    if mesh is not None:
      indices = pairing_lib.shard_indices(indices, mesh)
    return self._placed[1], place_batches(indices, plan.epochs(start, stop), mesh)


class StreamedImages:
  """A feed that decodes the images of a chunk while the device works on the chunk before.

  Each device gets only the images of its own batches, and each host decodes only those of its own devices.

  Args:
    data: training split, with images that are decoded when they are indexed.
  """

  sharded = True

  def __init__(self, data: ImageData):
    self._data = data
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "window")
    # The window that is most likely asked for next: its arguments and its future.
    self._ahead: tuple[tuple, concurrent.futures.Future] | None = None

  def prepare(self, plan, total_steps: int) -> None:
    """Does nothing, see `ResidentImages.prepare`."""

  def most_steps(self, plan) -> int:
    """The largest number of steps that a chunk may have: as many as fit into a window."""
    bytes_a_step = 2 * plan.batch_size * int(np.prod(self._data.images.shape[1:]))
    return int(np.clip(_WINDOW_BYTES // bytes_a_step, 1, chunk_lib.CHUNK_CAPACITY))

  def chunk(self, plan, start: int, stop: int, mesh) -> tuple[ImageData, step_lib.Batches]:
    """See `ResidentImages.chunk`; starts to decode the next chunk, which most likely has as many steps."""
    wanted, future = (plan, start, stop, mesh), None
    if self._ahead is not None and self._ahead[0] == wanted:
      future = self._ahead[1]
    data, indices = future.result() if future else self._window(*wanted)
    following = (plan, stop, 2 * stop - start, mesh)
    self._ahead = following, self._worker.submit(self._window, *following)
    return data, place_batches(indices, plan.epochs(start, stop), mesh)

  def _window(self, plan, start, stop, mesh):
    """Returns the images of these steps on the devices, and the indices of the batches in the window."""
    indices = plan.indices(start, stop)
    present = [role for role in indices if role is not None]
    if mesh is None:
      # A joint plan has indices [n, models, B].
      capacity = self.most_steps(plan) * sum(math.prod(role.shape[1:]) for role in present)
      stacked = np.stack(present)
      data, local = self._decode(stacked, capacity)
      local = iter(local)
      return jax.device_put(data), type(indices)(*(role if role is None else next(local) for role in indices))
    return self._sharded_window(pairing_lib.shard_indices(indices, mesh), self.most_steps(plan), mesh)

  def _sharded_window(self, indices, most_steps, mesh):
    """`_window` for indices [n, r, shards, b], with one window for each device."""
    axes = (mesh.devices.shape[0], mesh.devices[0].size)
    roles_a_device = indices.shape[1] // axes[0]
    capacity = most_steps * roles_a_device * indices.shape[3]
    local = np.full_like(indices, -1)
    windows = {}

    def window(index):
      place_of = tuple(part.start or 0 for part in index[:2])
      if place_of not in windows:
        role, shard = place_of
        own = np.s_[:, role * roles_a_device : (role + 1) * roles_a_device, shard]
        windows[place_of], local[own] = self._decode(indices[own], capacity)
      return windows[place_of]

    sharding = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(pairing_lib.ROLE_AXIS, pairing_lib.SHARE_AXES)
    )
    shapes = [self._data.images.shape[1:], (), (), ()]
    data = ImageData(
      *(
        jax.make_array_from_callback(
          (*axes, capacity, *shape),
          sharding,
          lambda index, field=field: np.asarray(window(index)[field])[None, None],
        )
        for field, shape in enumerate(shapes)
      )
    )
    return data, local

  def _decode(self, indices, capacity) -> tuple[ImageData, np.ndarray]:
    images, local, ids = data_lib.window(self._data.images, indices, capacity)
    return ImageData(images, self._data.labels[ids], self._data.forget[ids], ids), local
