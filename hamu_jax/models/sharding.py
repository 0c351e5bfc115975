"""Splits frozen weights over the devices of a mesh axis and gathers them where they are used.

As in ZeRO-3 and FSDP, a device keeps its part of each parameter and reads its own part of the batch. The
computation is plain data parallelism, but a layer's weights are gathered just before the layer runs, and
again in its backward pass, so that the weights of at most one layer are complete at a time. The weights are
frozen, so no gradients are scattered. Source: Rajbhandari et al., ZeRO (arXiv 1910.02054).
"""

from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Tree = Any

WEIGHTS_AXIS = "weights"
# Parameters of `models.llama` with a leading axis of layers, over which the model loops.
_STACKED = "layers"


def base_specs(like: Tree, mesh: jax.sharding.Mesh, axis: str = WEIGHTS_AXIS) -> Tree:
  """Chooses the axis of each parameter that is split, for `jax.shard_map`.

  Matrices are split along the first axis that the number of devices divides: parts that are consecutive
  in memory are gathered without a copy. Vectors are small and stay whole.

  Args:
    like: parameters of a `llama.Llama` or their shapes, such as `llama.abstract_params`.
    mesh: mesh of the devices.
    axis: mesh axis over which parameters are split.

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
  """Returns `base_specs` as `NamedSharding`s."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    base_specs(like, mesh, axis),
    is_leaf=lambda node: isinstance(node, PartitionSpec),
  )


def shard_like(like: Tree, mesh: jax.sharding.Mesh, axis: str = WEIGHTS_AXIS) -> Tree:
  """Adds the shardings of `base_shardings` to shapes, in the form that `llama_weights.load` takes."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    like,
    base_shardings(like, mesh, axis),
  )


def gather(parts: Tree, whole: Tree, axis: str) -> Tree:
  """Gathers parameters from the devices' parts, inside `shard_map`.

  Args:
    parts: parameters, each of which may be split along one axis.
    whole: shapes of the whole parameters; the tree may have more leaves than `parts`.
    axis: mesh axis over which they are split.

  Returns:
    The parameters with the shapes of `whole`. A parameter that is not split is returned unchanged.
  """
  if isinstance(parts, dict):
    return {name: gather(part, whole[name], axis) for name, part in parts.items()}
  for dim, (size, full_size) in enumerate(zip(parts.shape, whole.shape, strict=True)):
    if size != full_size:
      parts = lax.all_gather(parts, axis, axis=dim, tiled=True)
  return parts
