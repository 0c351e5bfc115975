"""Reads and writes weights as safetensors files with PyTorch's names and layouts.

A model's module defines `TORCH_NAMES`: pairs of a pattern for the path of a linen submodule and the name of
the PyTorch module with the same tensors, in the syntax of `re.sub`. The path of the model itself is empty.
Three rules are common to all models: `kernel` and `scale` are called `weight`; the running averages are
called `running_mean` and `running_var`; and kernels are transposed, [H, W, I, O] <-> [O, I, H, W] and
[I, O] <-> [O, I].
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from hamu_jax import outside
from hamu_jax.errors import UserError

Variables = Any
Names = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
  "cls_token": "cls_token",
  "pos_embed": "pos_embed",
}
# {rank: the axes of a variable in the order of its tensor's}.
_PERMUTATIONS = {1: (0,), 2: (1, 0), 3: (0, 1, 2), 4: (3, 2, 0, 1)}
# PyTorch's batch norm counts its batches. Neither library's results depend on the count.
_COUNTER = "num_batches_tracked"
_FILE = "model.safetensors"


class _Tensor(NamedTuple):
  """The path of a tensor's variable, and the variable's axes in the order of the tensor's."""

  path: tuple[str, ...]
  permutation: tuple[int, ...]


def matches(variables: Variables, names: Names) -> bool:
  """Whether `names` matches every submodule of these variables."""
  paths = {"/".join(path[1:-1]) for path in traverse_util.flatten_dict(variables)}
  return all(any(re.fullmatch(pattern, path) for pattern, _ in names) for path in paths)


def load_weights(path: str | os.PathLike, variables: Variables, names: Names) -> Variables:
  """Reads the variables of a model.

  Args:
    path: a safetensors file, or a Hugging Face folder that holds `model.safetensors`. The prefixes "module."
      and "_orig_mod." that PyTorch's wrappers give to all names do not count.
    variables: arrays or shapes of the model's variables, `{"params": ..., "batch_stats": ...}`.
    names: `TORCH_NAMES` of the model's module.

  Returns:
    Variables of the same structure, shapes and dtypes.

  Raises:
    UserError: if the file is missing or not safetensors, or a tensor is missing, unknown or of another
      shape.
  """
  found = _without_wrappers(_read(pathlib.Path(path)))
  layout = _layout(variables, names)
  flat = traverse_util.flatten_dict(variables)
  known = {*layout, *(_counter(name) for name in layout if name.endswith("running_mean"))}
  if missing := [name for name in layout if name not in found]:
    raise UserError(
      f"{path}: tensor {missing[0]!r} is missing ({len(missing)} in all); give a file of this model"
    )
  if unknown := sorted(set(found) - known):
    raise UserError(
      f"{path}: tensor {unknown[0]!r} is unknown ({len(unknown)} in all); give a file of this model"
    )
  loaded = {}
  for name, tensor in layout.items():
    wanted = flat[tensor.path]
    shape = tuple(wanted.shape[axis] for axis in tensor.permutation)
    if found[name].shape != shape:
      raise UserError(
        f"{path}: tensor {name!r} has shape {found[name].shape}, this model's has {shape}; give a file"
        " of this model"
      )
    value = found[name].transpose(np.argsort(tensor.permutation))
    loaded[tensor.path] = jnp.asarray(value, wanted.dtype)
  # A model without batch norm has an empty collection of statistics, which no tensor restores.
  return {collection: {} for collection in variables} | traverse_util.unflatten_dict(loaded)


def fingerprint(path: str | os.PathLike) -> str:
  """Computes the SHA-256, in hexadecimal, of the file that `load_weights` would read."""
  return hashlib.sha256(_find(pathlib.Path(path)).read_bytes()).hexdigest()


def weights_bytes(variables: Variables, names: Names) -> bytes:
  """Builds the safetensors file that `load_weights` and PyTorch's `load_state_dict` read.

  Args:
    variables: the model's variables, `{"params": ..., "batch_stats": ...}`.
    names: `TORCH_NAMES` of the model's module.

  Returns:
    The contents of the file.
  """
  flat = traverse_util.flatten_dict(jax.device_get(variables))
  tensors = {}
  for name, tensor in _layout(variables, names).items():
    value = np.asarray(flat[tensor.path])
    tensors[name] = np.ascontiguousarray(value.transpose(tensor.permutation))
    if name.endswith("running_mean"):
      tensors[_counter(name)] = np.zeros((), np.int64)
  return safetensors.numpy.save(tensors, metadata={"format": "pt"})


def _find(path):
  file = path / _FILE if path.is_dir() else path
  if not file.is_file():
    raise UserError(f"{file}: no such file; give a safetensors file or a folder with {_FILE}")
  return file


def _read(path):
  file = _find(path)
  with outside.read_of(file, "a safetensors file of NumPy types", "save the weights again, in float32"):
    return safetensors.numpy.load_file(file)


def _without_wrappers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Drops the prefixes of PyTorch's `DataParallel` and `torch.compile`, if all names have them."""
  prefix = os.path.commonprefix(list(tensors))
  wrappers = re.match(r"((module|_orig_mod)\.)*", prefix)
  assert wrappers is not None  # It matches the empty text.
  return {name.removeprefix(wrappers[0]): value for name, value in tensors.items()}


def _layout(variables, names):
  """Returns {tensor name: _Tensor} for all variables."""
  layout = {}
  for path, leaf in traverse_util.flatten_dict(variables).items():
    module = "/".join(path[1:-1])
    pattern, replacement = next(rule for rule in names if re.fullmatch(rule[0], module))
    owner, leaf_name = re.sub(pattern, replacement, module), _LEAVES[path[-1]]
    name = f"{owner}.{leaf_name}" if owner else leaf_name
    layout[name] = _Tensor(path, _PERMUTATIONS[len(leaf.shape)])
  return layout


def _counter(name):
  return name.rpartition(".")[0] + "." + _COUNTER
