"""Model architectures by name, and their weights as files."""

import difflib
import inspect
import os
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from hamu_jax.errors import UserError
from hamu_jax.models import convolution, mlp, resnet, vgg, vit, weights


class Architecture(NamedTuple):
  """A row of the registry."""

  module: type[nn.Module]
  preset: dict[str, Any]
  torch_names: weights.Names


MODELS = {
  f"resnet{depth}": Architecture(resnet.ResNet, {"depth": depth}, resnet.TORCH_NAMES)
  for depth in (8, 14, 20, 32, 44, 56, 110)
}
MODELS |= {
  f"resnet{depth}{suffix}": Architecture(
    resnet.TorchvisionResNet, {"depth": depth, "imagenet_stem": bool(suffix)}, resnet.TORCHVISION_NAMES
  )
  for depth in (18, 34, 50)
  for suffix in ("", "_imagenet")
}
MODELS |= {
  "vgg16_bn": Architecture(vgg.VGG, {"hidden": ()}, vgg.TORCH_NAMES),
  "vgg16_bn_imagenet": Architecture(vgg.VGG, {"hidden": (4096, 4096)}, vgg.TORCH_NAMES),
  "vit_s": Architecture(vit.ViT, {"patch": 4}, vit.TORCH_NAMES),
  "vit_s_imagenet": Architecture(vit.ViT, {"patch": 16}, vit.TORCH_NAMES),
  "mlp": Architecture(mlp.MLP, {}, mlp.TORCH_NAMES),
}
_ACCELERATOR_MICROBATCH = 1024


def build_model(
  name: str,
  *,
  num_classes: int,
  platform: str | None = None,
  dtype: Any = None,
  **options: Any,
) -> nn.Module:
  """The named architecture as a linen module.

  Args:
    name: a key of MODELS.
    num_classes: outputs.
    platform: what the model will run on ("cpu", "gpu", "tpu"); None takes the default backend, so
      compiling for another one needs it given. Parameters do not depend on it.
    dtype: of the computation; None takes the inputs' and parameters'.
    **options: fields of the module, such as `width`.

  Raises:
    UserError: no such architecture, or it has no such option.
  """
  if name not in MODELS:
    near = difflib.get_close_matches(name, MODELS, 1, 0)[0]
    raise UserError(f"model {name!r} is unknown, did you mean {near!r}? Choices: {', '.join(MODELS)}")
  architecture = MODELS[name]
  reserved = {"num_classes", "platform", "dtype", "parent", "name", *architecture.preset}
  fields = inspect.signature(architecture.module).parameters
  choices = [field for field in fields if field not in reserved]
  if unknown := sorted(set(options) - set(choices)):
    raise UserError(f"model {name!r} has no option {unknown[0]!r}; its options: {', '.join(choices)}")
  return architecture.module(
    num_classes=num_classes,
    platform=platform or jax.default_backend(),
    dtype=dtype,
    **architecture.preset,
    **options,
  )


def microbatch_size(height: int, width: int, platform: str | None = None) -> int:
  """Examples to differentiate at a time where batch norm is frozen.

  On a CPU what keeps a network's activations in the cache; elsewhere what fills a device and leaves
  a batch of any size within its memory.

  Args:
    height: of the images.
    width: of the images.
    platform: as of `build_model`.
  """
  if (platform or jax.default_backend()) == "cpu":
    return convolution.microbatch_size(height, width)
  return _ACCELERATOR_MICROBATCH


def load_weights(path: str | os.PathLike, template: weights.Variables) -> weights.Variables:
  """`weights.load_weights` with the names of the architecture whose variables the template has."""
  return weights.load_weights(path, template, _torch_names(template))


def weights_bytes(variables: weights.Variables) -> bytes:
  """`weights.weights_bytes` with the names of the architecture whose variables these are."""
  return weights.weights_bytes(variables, _torch_names(variables))


def save_weights(path: str | os.PathLike, variables: weights.Variables) -> None:
  """Writes `weights_bytes` to a file."""
  pathlib.Path(path).write_bytes(weights_bytes(variables))


def _torch_names(variables):
  return next(a.torch_names for a in MODELS.values() if weights.matches(variables, a.torch_names))
