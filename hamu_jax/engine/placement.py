"""Where arrays lie: on the default device, on every device of a mesh, or split among them."""

from typing import Any

import jax
import numpy as np

from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine import step as step_lib


def place(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """Puts arrays on the default device, or on every device of the mesh."""
  if mesh is None:
    return jax.device_put(tree)
  return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def _pad(steps: np.ndarray) -> np.ndarray:
  """Pads the leading axis to `CHUNK_CAPACITY` steps."""
  missing = step_lib.CHUNK_CAPACITY - steps.shape[0]
  return np.pad(steps, [(0, missing)] + [(0, 0)] * (steps.ndim - 1), constant_values=-1)


def place_feed(rows: Any, epoch: np.ndarray, mesh: jax.sharding.Mesh | None) -> step_lib.Feed:
  """Puts the batches of a chunk on the device, padded to `CHUNK_CAPACITY` steps.

  Args:
    rows: Paired [n, B] (of a joint plan [n, models, B]) int32 rows of each role, or None; with a mesh,
      what `pairing.shard_rows` made of them.
    epoch: [n] int32.
    mesh: where `pmap` splits the rows among devices.
  """
  rows, epoch = jax.tree.map(_pad, (rows, epoch))
  if mesh is None:
    return jax.device_put(step_lib.Feed(rows, epoch))
  spec = jax.sharding.PartitionSpec(None, pairing_lib.ROLE_AXIS, pairing_lib.SHARE_AXES)
  # By callback, because a host knows the rows within its own windows only.
  sharded = jax.make_array_from_callback(
    rows.shape, jax.sharding.NamedSharding(mesh, spec), lambda index: rows[index]
  )
  return step_lib.Feed(sharded, place(epoch, mesh))
