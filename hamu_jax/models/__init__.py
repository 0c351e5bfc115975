"""The registry of model architectures, and reading and writing their weights."""

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
  """One architecture of the registry: its module, the fields that its name sets, and PyTorch's names."""

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
  f"wide_resnet50_2{suffix}": Architecture(
    resnet.TorchvisionResNet,
    {"depth": 50, "imagenet_stem": bool(suffix), "widening": 2},
    resnet.TORCHVISION_NAMES,
  )
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
  """Builds the named architecture as a linen module.

  Args:
    name: a key of `MODELS`.
    num_classes: number of outputs.
    platform: platform that the model will run on ("cpu", "gpu" or "tpu"). None is the default backend; give
      it to compile for another one. Parameters do not depend on it.
    dtype: type of the computation; None promotes the types of inputs and parameters.
    **options: fields of the module, such as `width`.

  Returns:
    The module.

  Raises:
    UserError: for an unknown architecture, or an option that it does not have.
  """
  if name not in MODELS:
    near = difflib.get_close_matches(name, MODELS, 1, 0)[0]
    raise UserError(f"model {name!r} is unknown, did you mean {near!r}? Choices: {', '.join(MODELS)}")
  architecture = MODELS[name]
  reserved = {"num_classes", "platform", "dtype", "parent", "name", *architecture.preset}
  fields = inspect.signature(architecture.module).parameters
  choices = [field for field in fields if field not in reserved]
  if unknown := sorted(set(options) - set(choices)):
    option = unknown[0]
    raise UserError(
      f"{option}={options[option]!r}: model {name!r} has no such option; leave it unset; its options: "
      f"{', '.join(choices)}"
    )
  return architecture.module(
    num_classes=num_classes,
    platform=platform or jax.default_backend(),
    dtype=dtype,
    **architecture.preset,
    **options,
  )


def microbatch_size(height: int, width: int, platform: str | None = None) -> int:
  """Number of examples to differentiate at a time, for a model with frozen batch norm.

  On a CPU, a network's activations for this many examples stay in the cache. On an accelerator, this many
  fill the device, and a batch of any size fits its memory.

  Args:
    height: height of the images in pixels.
    width: width of the images in pixels.
    platform: see `build_model`.
  """
  if (platform or jax.default_backend()) == "cpu":
    return convolution.microbatch_size(height, width)
  return _ACCELERATOR_MICROBATCH


def load_weights(path: str | os.PathLike, template: weights.Variables) -> weights.Variables:
  """Calls `weights.load_weights` with the PyTorch names of the template's architecture."""
  return weights.load_weights(path, template, _torch_names(template))


def weights_bytes(variables: weights.Variables) -> bytes:
  """Calls `weights.weights_bytes` with the PyTorch names of the variables' architecture."""
  return weights.weights_bytes(variables, _torch_names(variables))


def save_weights(path: str | os.PathLike, variables: weights.Variables) -> None:
  """Writes `weights_bytes` to a file."""
  pathlib.Path(path).write_bytes(weights_bytes(variables))


def _torch_names(variables):
  return next(a.torch_names for a in MODELS.values() if weights.matches(variables, a.torch_names))
