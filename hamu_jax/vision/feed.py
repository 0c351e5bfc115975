"""Where the images of a chunk of steps are: resident on the device, or brought in window by window.

Either way a step gathers its batch from `ImageData` by index, so the step itself knows nothing of it.
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

# Bytes of images that one window may hold on a device.
_WINDOW_BYTES = 2**29


class ImageData(NamedTuple):
  """What steps gather from.

  Attributes:
    images: [M, H, W, C] uint8.
    labels: [M] int32.
    forget: [M] bool, whether an example is to be forgotten.
    ids: [M] int32, the index in the training split that each has.
  """

  images: Any
  labels: Any
  forget: Any
  ids: Any


class ResidentImages:
  """All images stay on the device.

  Args:
    data: the whole training split.
  """

  sharded = False

  def __init__(self, data: ImageData):
    self._data = data
    self._placed: tuple[Any, ImageData] | None = None

  def prepare(self, plan, total_steps: int) -> None:
    """Gets ready for the first steps of a plan."""

  def most_steps(self, plan) -> int:
    """Most steps that a chunk may have."""
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
  """Each chunk brings the images of its own examples, decoded while the device works on the one before.

  Every device gets the examples of its own batches alone, and a host decodes those of its own devices.

  Args:
    data: the training split, with images that are decoded where they are indexed.
  """

  sharded = True

  def __init__(self, data: ImageData):
    self._data = data
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "window")
    # The window that is most likely asked for next: what it is of, and its future.
    self._ahead: tuple[tuple, concurrent.futures.Future] | None = None

  def prepare(self, plan, total_steps: int) -> None:
    """As `ResidentImages.prepare`."""

  def most_steps(self, plan) -> int:
    """Most steps that a chunk may have: as many as fit a window."""
    bytes_a_step = 2 * plan.batch_size * int(np.prod(self._data.images.shape[1:]))
    return int(np.clip(_WINDOW_BYTES // bytes_a_step, 1, chunk_lib.CHUNK_CAPACITY))

  def chunk(self, plan, start: int, stop: int, mesh) -> tuple[ImageData, step_lib.Batches]:
    """As `ResidentImages.chunk`; starts on the chunk after it, which is most likely as long."""
    wanted, future = (plan, start, stop, mesh), None
    if self._ahead is not None and self._ahead[0] == wanted:
      future = self._ahead[1]
    data, indices = future.result() if future else self._window(*wanted)
    following = (plan, stop, 2 * stop - start, mesh)
    self._ahead = following, self._worker.submit(self._window, *following)
    return data, place_batches(indices, plan.epochs(start, stop), mesh)

  def _window(self, plan, start, stop, mesh):
    """-> the images of these steps on the devices, and the examples counted within them."""
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
    """`_window` of indices [n, r, shards, b]: one window for each device."""
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
