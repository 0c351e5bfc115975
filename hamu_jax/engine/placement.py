"""Places arrays on the default device, on every device of a mesh, or split among its devices."""

from typing import Any

import jax
import numpy as np

from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine import step as step_lib


def place(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """Places arrays on the default device, or on every device of the mesh."""
  if mesh is None:
    return jax.device_put(tree)
  return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def _pad(steps: np.ndarray) -> np.ndarray:
  """Pads the leading axis to `CHUNK_CAPACITY` steps."""
  missing = chunk_lib.CHUNK_CAPACITY - steps.shape[0]
  return np.pad(steps, [(0, missing)] + [(0, 0)] * (steps.ndim - 1), constant_values=-1)


def place_batches(indices: Any, epoch: np.ndarray, mesh: jax.sharding.Mesh | None) -> step_lib.Batches:
  """Places the batches of a chunk on the device, padded to `CHUNK_CAPACITY` steps.

  Args:
    indices: Paired [n, B] int32 indices of each role, or None; [n, models, B] of a joint plan. With a mesh,
      the result of `pairing.shard_indices`.
    epoch: [n] int32 epoch of each step.
    mesh: devices of `pmap`, among which the indices are split; None for the default device.
  """
  indices, epoch = jax.tree.map(_pad, (indices, epoch))
  if mesh is None:
    return step_lib.Batches(*jax.device_put((indices, epoch)))
  spec = jax.sharding.PartitionSpec(None, pairing_lib.ROLE_AXIS, pairing_lib.SHARE_AXES)
  # A callback, because a host knows the indices of its own devices' windows only.
  sharded = jax.make_array_from_callback(
    indices.shape, jax.sharding.NamedSharding(mesh, spec), lambda index: indices[index]
  )
  return step_lib.Batches(sharded, place(epoch, mesh))
