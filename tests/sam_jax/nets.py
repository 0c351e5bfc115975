"""The two small networks of the golden numbers, and their flat parameters as trees and back."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from hamu_jax.engine.objectives import Outputs
from hamu_jax.models.batch_norm import BatchNorm


class Mlp(nn.Module):
  """8 -> 16 -> classes."""

  classes: int

  @nn.compact
  def __call__(self, x_BxD, *, train, mask=None, axis_name=None):
    del train, mask, axis_name  # It has no batch norm.
    return nn.Dense(self.classes, name="fc2")(nn.relu(nn.Dense(16, name="fc1")(x_BxD)))


class Conv(nn.Module):
  """Two convolutions of 6x6 images with this project's batch norm, their mean, and a classifier."""

  classes: int

  @nn.compact
  def __call__(self, x_BxHxWxC, *, train, mask=None, axis_name=None):
    def block(x, features, number):
      x = nn.Conv(features, (3, 3), padding=1, use_bias=False, name=f"conv{number}")(x)
      norm = BatchNorm(features, name=f"bn{number}")
      return nn.relu(norm(x, train=train, mask=mask, axis_name=axis_name))

    x = nn.avg_pool(block(x_BxHxWxC, 4, 1), (2, 2), (2, 2))
    return nn.Dense(self.classes, name="fc")(block(x, 6, 2).mean((1, 2)))


def make(name, classes):
  """The module: "mlp" or "conv"."""
  return {"mlp": Mlp, "conv": Conv}[name](classes)


def _shapes(name, classes):
  """PyTorch's shapes by name, in the order in which they are flat."""
  if name == "mlp":
    return {
      "fc1.weight": (16, 8),
      "fc1.bias": (16,),
      "fc2.weight": (classes, 16),
      "fc2.bias": (classes,),
    }
  return {
    "conv1.weight": (4, 3, 3, 3),
    "bn1.weight": (4,),
    "bn1.bias": (4,),
    "conv2.weight": (6, 4, 3, 3),
    "bn2.weight": (6,),
    "bn2.bias": (6,),
    "fc.weight": (classes, 6),
    "fc.bias": (classes,),
  }


_BUFFERS = {
  "mlp": {},
  "conv": {
    "bn1.running_mean": (4,),
    "bn1.running_var": (4,),
    "bn1.num_batches_tracked": (1,),
    "bn2.running_mean": (6,),
    "bn2.running_var": (6,),
    "bn2.num_batches_tracked": (1,),
  },
}
_LEAVES = {"bias": "bias", "running_mean": "mean", "running_var": "var"}


def _place(torch_name, rank):
  """-> (layer, leaf, axes of PyTorch's array in the order of Flax's)."""
  layer, leaf = torch_name.split(".")
  axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(rank, tuple(range(rank)))
  if leaf == "weight":
    leaf = "scale" if layer.startswith("bn") else "kernel"
  return layer, _LEAVES.get(leaf, leaf), axes


def _pieces(shapes):
  """(name, shape, slice) of each tensor."""
  start = 0
  for name, shape in shapes.items():
    size = int(np.prod(shape))
    yield name, shape, slice(start, start + size)
    start += size


def _tree(flat, shapes):
  tree = {}
  for name, shape, piece in _pieces(shapes):
    layer, leaf, axes = _place(name, len(shape))
    if leaf != "num_batches_tracked":
      tree.setdefault(layer, {})[leaf] = jnp.asarray(flat[piece].reshape(shape).transpose(axes))
  return tree


def params(name, classes, flat):
  """Flat parameters [P] as the tree of `make(name, classes)`."""
  return _tree(flat, _shapes(name, classes))


def batch_stats(name, flat):
  """Flat buffers as running statistics."""
  return _tree(flat, _BUFFERS[name])


def flat_params(name, classes, tree):
  """The inverse of `params`."""
  flat = []
  for torch_name, shape, _ in _pieces(_shapes(name, classes)):
    layer, leaf, axes = _place(torch_name, len(shape))
    flat.append(np.asarray(tree[layer][leaf]).transpose(np.argsort(axes)).ravel())
  return np.concatenate(flat)


def inputs(name, x):
  """PyTorch's inputs, NCHW for images, as Flax's."""
  return jnp.asarray(x.transpose(0, 2, 3, 1) if name == "conv" else x)


def forward(model, axis_name=None):
  """(variables, batch, key, train) -> (Outputs, batch_stats), as the step takes it."""

  def apply(variables, batch, key, train):
    del key
    logits, updated = model.apply(
      variables,
      batch["image"],
      train=train,
      mask=batch["mask"],
      axis_name=axis_name,
      mutable=["batch_stats"],
    )
    return Outputs(logits), updated.get("batch_stats", variables["batch_stats"])

  return apply
