"""Where the images of a chunk of steps are: resident on the device, or brought in window by window.

Either way a step gathers its batch from `ImageData` by row, so the step itself knows nothing of it.
"""

import concurrent.futures
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from hamu_jax import data as data_lib
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.placement import place, place_feed

# Bytes of images that one window may hold on a device.
_WINDOW_BYTES = 2**29


class ImageData(NamedTuple):
  """What steps gather from.

  Attributes:
    images: [M, H, W, C] uint8.
    labels: [M] int32.
    forget: [M] bool, whether an example is to be forgotten.
    ids: [M] int32, the row of the training split that each is.
  """

  images: Any
  labels: Any
  forget: Any
  ids: Any


class Resident:
  """All images stay on the device.

  Args:
    data: the whole training split.
  """

  sharded = False

  def __init__(self, data: ImageData):
    self._data = data
    self._placed = None

  def prepare(self, plan, total_steps: int) -> None:
    """Gets ready for the first steps of a plan."""

  def most_steps(self, plan) -> int:
    """Most steps that a chunk may have."""
    del plan
    return step_lib.CHUNK_CAPACITY

  def chunk(self, plan, start: int, stop: int, mesh) -> tuple[ImageData, step_lib.Feed]:
    """The data and the batches of the steps start..stop-1 of a plan, on the devices of the mesh."""
    if self._placed is None or self._placed[0] != mesh:
      self._placed = None  # Frees the copy on another mesh first.
      self._placed = (mesh, place(self._data, mesh))
    rows = plan.rows(start, stop)
    if mesh is not None:
      rows = pairing_lib.shard_rows(rows, mesh)
    return self._placed[1], place_feed(rows, plan.epochs(start, stop), mesh)


class Streamed:
  """Each chunk brings the images of its own rows, decoded while the device works on the one before.

  Every device gets the rows of its own batches alone, and a host decodes those of its own devices.

  Args:
    data: the training split, with images that are decoded where they are indexed.
  """

  sharded = True

  def __init__(self, data: ImageData):
    self._data = data
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "window")
    # The window that is most likely asked for next: what it is of, and its future.
    self._ahead = None

  def prepare(self, plan, total_steps: int) -> None:
    """As `Resident.prepare`."""

  def most_steps(self, plan) -> int:
    """Most steps that a chunk may have: as many as fit a window."""
    bytes_a_step = 2 * plan.batch_size * int(np.prod(self._data.images.shape[1:]))
    return int(np.clip(_WINDOW_BYTES // bytes_a_step, 1, step_lib.CHUNK_CAPACITY))

  def chunk(self, plan, start: int, stop: int, mesh) -> tuple[ImageData, step_lib.Feed]:
    """As `Resident.chunk`; starts on the chunk after it, which is most likely as long."""
    wanted, future = (plan, start, stop, mesh), None
    if self._ahead is not None and self._ahead[0] == wanted:
      future = self._ahead[1]
    data, rows = future.result() if future else self._window(*wanted)
    following = (plan, stop, 2 * stop - start, mesh)
    self._ahead = following, self._worker.submit(self._window, *following)
    return data, place_feed(rows, plan.epochs(start, stop), mesh)

  def _window(self, plan, start, stop, mesh):
    """-> the images of these steps on the devices, and the rows counted within them."""
    rows = plan.rows(start, stop)
    present = [role for role in rows if role is not None]
    if mesh is None:
      # A joint plan has rows [n, models, B].
      capacity = self.most_steps(plan) * sum(math.prod(role.shape[1:]) for role in present)
      stacked = np.stack(present)
      data, local = self._decode(stacked, capacity)
      local = iter(local)
      return jax.device_put(data), type(rows)(*(role if role is None else next(local) for role in rows))
    return self._sharded_window(pairing_lib.shard_rows(rows, mesh), self.most_steps(plan), mesh)

  def _sharded_window(self, rows, most_steps, mesh):
    """`_window` of rows [n, r, shards, b]: one window for each device."""
    axes = (mesh.devices.shape[0], mesh.devices[0].size)
    roles_a_device = rows.shape[1] // axes[0]
    capacity = most_steps * roles_a_device * rows.shape[3]
    local = np.full_like(rows, -1)
    windows = {}

    def window(index):
      place_of = tuple(part.start or 0 for part in index[:2])
      if place_of not in windows:
        role, shard = place_of
        own = np.s_[:, role * roles_a_device : (role + 1) * roles_a_device, shard]
        windows[place_of], local[own] = self._decode(rows[own], capacity)
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

  def _decode(self, rows, capacity) -> tuple[ImageData, np.ndarray]:
    images, local, ids = data_lib.window(self._data.images, rows, capacity)
    return ImageData(images, self._data.labels[ids], self._data.forget[ids], ids), local
