"""Where arrays lie: on the default device, on every device of a mesh, or split among them."""

from typing import Any

import jax
import numpy as np

from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine import step as step_lib


def place(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """Puts arrays on the default device, or on every device of the mesh."""
  if mesh is None:
    return jax.device_put(tree)
  return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def _pad(steps: np.ndarray) -> np.ndarray:
  """Pads the leading axis to `CHUNK_CAPACITY` steps."""
  missing = chunk_lib.CHUNK_CAPACITY - steps.shape[0]
  return np.pad(steps, [(0, missing)] + [(0, 0)] * (steps.ndim - 1), constant_values=-1)


def place_batches(indices: Any, epoch: np.ndarray, mesh: jax.sharding.Mesh | None) -> step_lib.Batches:
  """Puts the batches of a chunk on the device, padded to `CHUNK_CAPACITY` steps.

  Args:
    indices: Paired [n, B] (of a joint plan [n, models, B]) int32 examples of each role, or None; with a mesh,
      what `pairing.shard_indices` made of them.
    epoch: [n] int32.
    mesh: where `pmap` splits the examples among devices.
  """
  indices, epoch = jax.tree.map(_pad, (indices, epoch))
  if mesh is None:
    return step_lib.Batches(*jax.device_put((indices, epoch)))
  spec = jax.sharding.PartitionSpec(None, pairing_lib.ROLE_AXIS, pairing_lib.SHARE_AXES)
  # By callback, because a host knows the examples within its own windows only.
  sharded = jax.make_array_from_callback(
    indices.shape, jax.sharding.NamedSharding(mesh, spec), lambda index: indices[index]
  )
  return step_lib.Batches(sharded, place(epoch, mesh))
