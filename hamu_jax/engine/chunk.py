"""A chunk of steps, which runs as one device program."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine.step import Batches
from hamu_jax.engine.sub_step import Frozen
from hamu_jax.run import compilation
from hamu_jax.transforms.stop import Stop

Tree = Any
# Largest number of steps of a chunk: the size of its metric buffers.
CHUNK_CAPACITY = 64


def make_chunk(step):
  """Makes a function that runs up to `CHUNK_CAPACITY` steps as one device program.

  Args:
    step: the step of `step.make_step`.

  Returns:
    (state, Frozen, data, Batches, count, hyperparameters) -> (state, metrics, done). The batches have a
    leading axis of CHUNK_CAPACITY steps. The first `count` of them (int32 scalar) are run, or fewer if a step
    stops. Metrics are stacked along the same axis, and `done` is the number of steps that ran. The number of
    steps is data, so one compilation serves every chunk of a stage.
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
  """Jits a chunk: for one model, for models that are trained together, or for the devices of a mesh.

  Args:
    chunk: function of `make_chunk`.
    mesh: devices of `pmap`; None for one device.
    roles: roles whose indices the batches have.
    members: number of models that are trained together, 0 for one model. States, references, masks,
      hyperparameters and metrics then have a leading axis of members.
    separate_indices: whether each member has its own indices, [n, members, B]; else all have the same.
    sharded_data: whether each device of the mesh has its own data, whose leaves have leading axes [roles,
      devices a role]; else all devices have the same.
    base_specs: partition specs of `Frozen.base` on the mesh.
  """
  if members:
    batches = Batches(indices=1 if separate_indices else None, epoch=None)
    return compilation.jit(jax.vmap(chunk, in_axes=(0, Frozen(0, 0, None), None, batches, None, 0)))
  if mesh is None:
    return compilation.jit(chunk)
  spec = jax.sharding.PartitionSpec
  index_spec = spec(None, pairing_lib.ROLE_AXIS, pairing_lib.SHARE_AXES)
  frozen_spec = Frozen(spec(), spec(), base_specs)
  data_spec = spec(pairing_lib.ROLE_AXIS, pairing_lib.SHARE_AXES) if sharded_data else spec()

  def device_chunk(state, frozen, data, batches, count, hyperparameters):
    if sharded_data:
      data = jax.tree.map(lambda leaf: leaf[0, 0], data)
    batches = batches._replace(indices=pairing_lib.own_indices(batches.indices, roles, mesh))
    return chunk(state, frozen, data, batches, count, hyperparameters)

  return compilation.jit(
    jax.shard_map(
      device_chunk,
      mesh=mesh,
      in_specs=(
        spec(),
        frozen_spec,
        data_spec,
        Batches(indices=index_spec, epoch=spec()),
        spec(),
        spec(),
      ),
      out_specs=spec(),
      # The step's results are equal on every device by construction (each holds both reduced
      # gradients), which the checker cannot see through `ppermute`.
      check_vma=False,
    ),
    platform=mesh.devices.flat[0].platform,
  )
