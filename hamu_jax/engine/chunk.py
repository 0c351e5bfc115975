"""A chunk of steps, run as a single device program."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine.step import Batches
from hamu_jax.engine.sub_step import Frozen
from hamu_jax.transforms.stop import Stop

Tree = Any
# Most steps of one device program: the size of its metric buffers.
CHUNK_CAPACITY = 64


def make_chunk(step):
  """Runs up to `CHUNK_CAPACITY` steps as one device program.

  Returns:
    (state, Frozen, data, Batches, count, hyperparameters) -> (state, metrics, done). The batches have a
    leading axis of CHUNK_CAPACITY, of which the first `count` (int32 scalar, data) are run, fewer if a step
    stops; metrics are stacked along the same axis and `done` says how many of them are filled. The number of
    steps being data, one compilation serves every chunk of a stage.
  """

  def chunk(state, frozen, data, batches, count, hyperparameters):
    def one(state, index):
      step_batches = jax.tree.map(lambda leaf: leaf[index], batches)
      return step(state, frozen, data, step_batches, hyperparameters)

    _, shapes = jax.eval_shape(one, state, jnp.zeros([], jnp.int32))
    buffers = jax.tree.map(lambda leaf: jnp.zeros((CHUNK_CAPACITY, *leaf.shape), leaf.dtype), shapes)

    def running(carry):
      state, _, index = carry
      return (index < count) & (state.stop == Stop.NONE)

    def body(carry):
      state, buffers, index = carry
      state, metrics = one(state, index)
      buffers = jax.tree.map(lambda buffer, value: buffer.at[index].set(value), buffers, metrics)
      return state, buffers, index + 1

    return lax.while_loop(running, body, (state, buffers, jnp.zeros([], jnp.int32)))

  return chunk


def compile_target(
  chunk,
  mesh: jax.sharding.Mesh | None,
  roles: tuple[str, ...],
  *,
  members: int = 0,
  separate_indices: bool = False,
  sharded_data: bool = False,
  base_specs: Tree = jax.sharding.PartitionSpec(),
):
  """The jitted chunk: as it is, over models that are trained together, or over the devices of a mesh.

  Args:
    chunk: as `make_chunk` builds it.
    mesh: of `pmap`; None for one device.
    roles: the roles whose examples the batches have.
    members: if not 0, as many states, references, masks, hyperparameters and metrics, all with a leading
      axis, are mapped over.
    separate_indices: whether each of them has its own examples, [n, members, B]; else all have the same.
    sharded_data: whether each device of the mesh has data of its own, of which the leaves have leading
      axes [roles, devices a role]; else all have the same.
    base_specs: how `Frozen.base` lies on the mesh.
  """
  if members:
    batches = Batches(indices=1 if separate_indices else None, epoch=None)
    return jax.jit(jax.vmap(chunk, in_axes=(0, Frozen(0, 0, None), None, batches, None, 0)))
  if mesh is None:
    return jax.jit(chunk)
  spec = jax.sharding.PartitionSpec
  sharded_rows = spec(None, pairing_lib.ROLE_AXIS, pairing_lib.SHARE_AXES)
  frozen_spec = Frozen(spec(), spec(), base_specs)
  data_spec = spec(pairing_lib.ROLE_AXIS, pairing_lib.SHARE_AXES) if sharded_data else spec()

  def device_chunk(state, frozen, data, batches, count, hyperparameters):
    if sharded_data:
      data = jax.tree.map(lambda leaf: leaf[0, 0], data)
    batches = batches._replace(indices=pairing_lib.own_indices(batches.indices, roles, mesh))
    return chunk(state, frozen, data, batches, count, hyperparameters)

  return jax.jit(
    jax.shard_map(
      device_chunk,
      mesh=mesh,
      in_specs=(
        spec(),
        frozen_spec,
        data_spec,
        Batches(indices=sharded_rows, epoch=spec()),
        spec(),
        spec(),
      ),
      out_specs=spec(),
      # The step's results are equal on every device by construction (each holds both reduced
      # gradients), which the checker cannot see through `ppermute`.
      check_vma=False,
    )
  )
