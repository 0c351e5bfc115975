"""Frozen weights, split over the devices of a mesh axis and gathered where they are used.

As in ZeRO-3 and FSDP, a device keeps its part of each parameter and sees its own part of the batch:
what it computes is plain data parallelism, but a layer's weights are put together just before the
layer runs, and again in its backward pass, so that no more than a layer's are whole at a time.
Source: Rajbhandari et al., ZeRO (arXiv 1910.02054). Here the weights are frozen, so that no gradient
of theirs has to be scattered.
"""

from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Tree = Any

WEIGHTS_AXIS = "weights"
# Parameters of `models.llama` with a leading axis of layers, which the loop over layers takes apart.
_STACKED = "layers"


def base_specs(like: Tree, mesh: jax.sharding.Mesh, axis: str = WEIGHTS_AXIS) -> Tree:
  """Which axis of each parameter is split, for `jax.shard_map`.

  Matrices are split along their first axis that the devices divide evenly: parts that follow each other
  in memory are put together without a copy. Vectors, which are small, stay whole.

  Args:
    like: parameters of a `llama.Llama` or their shapes, such as `llama.abstract_params`.
    mesh: has the axis.
    axis: of the mesh, over which parameters are split.

  Returns:
    `PartitionSpec`s in the structure of `like`; the leading axis of stacked layers is never split.
  """
  size = mesh.shape[axis]

  def spec(path, leaf):
    first = int(path[0].key == _STACKED)
    if len(leaf.shape) - first < 2:
      return PartitionSpec()
    for dim in range(first, len(leaf.shape)):
      if leaf.shape[dim] % size == 0:
        return PartitionSpec(*[None] * dim, axis)
    return PartitionSpec()

  return jax.tree_util.tree_map_with_path(spec, like)


def base_shardings(like: Tree, mesh: jax.sharding.Mesh, axis: str = WEIGHTS_AXIS) -> Tree:
  """`base_specs` as `NamedSharding`s."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    base_specs(like, mesh, axis),
    is_leaf=lambda node: isinstance(node, PartitionSpec),
  )


def shard_like(like: Tree, mesh: jax.sharding.Mesh, axis: str = WEIGHTS_AXIS) -> Tree:
  """Shapes with the shardings of `base_shardings`: what `llama_weights.load` takes."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    like,
    base_shardings(like, mesh, axis),
  )


def gather(parts: Tree, whole: Tree, axis: str) -> Tree:
  """Inside `shard_map`: puts parameters together from the devices' parts.

  Args:
    parts: parameters, of which an axis may be split.
    whole: the same structure, or more, with the shapes of whole parameters.
    axis: of the mesh, over which they are split.

  Returns:
    `parts` with the shapes of `whole`; a parameter that is whole already stays as it is.
  """
  if isinstance(parts, dict):
    return {name: gather(part, whole[name], axis) for name, part in parts.items()}
  for dim, (size, full_size) in enumerate(zip(parts.shape, whole.shape, strict=True)):
    if size != full_size:
      parts = lax.all_gather(parts, axis, axis=dim, tiled=True)
  return parts
