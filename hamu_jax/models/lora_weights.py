"""Adapters in PEFT's format: a folder with `adapter_config.json` and `adapter_model.safetensors`.

In this project factors are stacked over layers and are [inputs, r] and [r, outputs]. In PEFT's format each
layer has its own factors, and they are [r, inputs] and [outputs, r].
"""

import hashlib
import json
import os
import pathlib
import re
from typing import Any

import numpy as np
import safetensors.numpy
from flax import traverse_util

from hamu_jax import outside
from hamu_jax.errors import UserError
from hamu_jax.models import llama_weights, peft_config
from hamu_jax.models.lora import LoraConfig

Tree = Any

_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def load_adapter(path: str | os.PathLike, params: Tree) -> tuple[LoraConfig, Tree]:
  """Reads an adapter of a Llama.

  Layers of different ranks and scales, and layers that are not adapted, share one stack: missing columns of
  A and rows of B are 0, and the ratio of a layer's scale to the configuration's is multiplied into its B.

  Args:
    path: the folder.
    params: parameters of the base model, or their shapes.

  Returns:
    (configuration, values). The values are NumPy arrays in the form of `lora.init` and the file's dtype;
    float32 where scales differ.

  Raises:
    UserError: if a file is missing or damaged, or the adapter uses an unsupported feature or is for another
      model.
  """
  folder = pathlib.Path(path)
  values = peft_config.read(folder)
  tensors = _read_tensors(folder)
  layers = params["layers"]["input_layernorm"]["scale"].shape[0]
  kernels = {}
  for kernel, leaf in traverse_util.flatten_dict(params).items():
    if kernel[-1] == "kernel":
      modules = [tensor.name.removesuffix(".weight") for tensor in llama_weights.layout(kernel, layers)]
      if any(map(values.targets, modules)):
        kernels[kernel[:-1]] = (modules, leaf.shape[-2:])
  adapted = [module for modules, _ in kernels.values() for module in modules if values.targets(module)]
  _check_names(folder, tensors, adapted)
  if not adapted:
    raise UserError(
      f"{folder}: target_modules={values.target_modules!r} names no linear layer of this model; give the "
      "adapter's base model"
    )
  rank = max(map(values.rank, adapted))
  scales = {module: values.scaling(module) for module in adapted}
  # The rank of a plain adapter is that of all its layers, and so its alpha is the one of its file.
  plain = len(set(scales.values())) == 1 and not values.use_rslora and values.r == rank
  alpha = values.lora_alpha if plain and not values.alpha_pattern else scales[adapted[0]] * rank
  adapter = {}
  for owner, (modules, (inputs, outputs)) in kernels.items():
    stacks: dict[str, list] = {"lora_A": [], "lora_B": []}
    for module in modules:
      a, b = _factors(folder, tensors, module, values, (inputs, outputs), rank)
      if module in scales and scales[module] != scales[adapted[0]]:
        b = np.float32(scales[module] / scales[adapted[0]]) * b.astype(np.float32)
      stacks["lora_A"].append(a)
      stacks["lora_B"].append(b)
    for factor, parts in stacks.items():
      adapter[*owner, factor] = np.stack(parts) if owner[0] == "layers" else parts[0]
  config = LoraConfig(rank=rank, alpha=alpha, dropout=values.lora_dropout, targets=_targets(adapter))
  return config, traverse_util.unflatten_dict(adapter)


def fingerprint(path: str | os.PathLike) -> str:
  """Computes the SHA-256, in hexadecimal, of an adapter's files.

  Raises:
    UserError: if a file is missing.
  """
  digest = hashlib.sha256()
  for name in (peft_config.CONFIG_FILE, _FILE):
    try:
      digest.update((pathlib.Path(path) / name).read_bytes())
    except OSError as error:
      raise UserError(
        f"{path}: {name} cannot be read ({error.strerror}); give the folder of an adapter"
      ) from None
  return digest.hexdigest()


def save_adapter(path: str | os.PathLike, adapter: Tree, config: LoraConfig, *, base_model: str = "") -> None:
  """Writes an adapter in the format that PEFT and vLLM read.

  Args:
    path: the folder, created if it does not exist; an adapter in it is replaced.
    adapter: adapter in the form of `lora.init`.
    config: configuration of the adapter.
    base_model: folder or hub id of the base model, for programs that load the adapter by itself.

  Raises:
    UserError: if the folder cannot be written.
  """
  flat = traverse_util.flatten_dict(adapter)
  tensors = {}
  for path_of, value in flat.items():
    stack = np.asarray(value) if path_of[0] == "layers" else np.asarray(value)[None]
    names = _names(path_of[:-1], len(stack))[path_of[-1]]
    for name, part in zip(names, stack, strict=True):
      tensors[name] = np.ascontiguousarray(part.T)
  values = peft_config.written(
    rank=config.rank,
    alpha=config.alpha,
    dropout=config.dropout,
    targets=_targets(flat),
    base_model=base_model,
  )
  folder = pathlib.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    llama_weights.write_safetensors(folder / _FILE, tensors)
    (folder / peft_config.CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
  except OSError as error:
    raise UserError(
      f"{folder}: cannot be written ({error.strerror or error}); choose another folder"
    ) from None


def _names(module, layers):
  """{"lora_A": [names of the tensors of a linear layer], "lora_B": ...}, in order of the layers."""
  kernels = llama_weights.layout((*module, "kernel"), layers)
  owners = [tensor.name.removesuffix(".weight") for tensor in kernels]
  return {
    factor: [f"{_PREFIX}{owner}.{factor}.weight" for owner in owners] for factor in ("lora_A", "lora_B")
  }


def _targets(adapter):
  return tuple(sorted({path[-2] for path in adapter}))


def _read_tensors(folder):
  file = folder / _FILE
  if not file.is_file():
    others = sorted(found.name for found in folder.glob("adapter_model.*"))
    if others:
      raise UserError(
        f"{folder}: holds {others[0]}, which may run code when it is read, and no {_FILE}; save the adapter "
        "again with safe_serialization=True"
      )
    raise UserError(f"{file}: no such file; give the folder of a PEFT adapter")
  with outside.read_of(file, "a safetensors file of NumPy types", "write the adapter again"):
    return safetensors.numpy.load_file(file)


def _check_names(folder, tensors, adapted):
  """Refuses the first tensor that no adapted layer has, and says why it has no place."""
  wanted = {f"{_PREFIX}{module}.lora_{factor}.weight" for module in adapted for factor in "AB"}
  unknown = sorted(set(tensors) - wanted)
  if not unknown:
    return
  name = unknown[0]
  where = f"{folder}: tensor {name!r} ({len(unknown)} such in all)"
  if not name.startswith(_PREFIX):
    raise UserError(
      f"{where} lacks the prefix {_PREFIX!r} of PEFT's names; save the adapter with PEFT's save_pretrained"
    )
  if live := re.search(r"\.lora_[AB]\.([^.]+)\.weight$", name):
    raise UserError(
      f"{where} names the adapter itself ('.{live[1]}.'), as state_dict() of a live model does; save the "
      "adapter with PEFT's save_pretrained"
    )
  if factor := re.search(r"\.lora_[AB]\.weight$", name):
    module = name.removeprefix(_PREFIX).removesuffix(factor[0])
    raise UserError(
      f"{where} adapts {module!r}, which is no linear layer of this model, or not among the adapter's "
      "target_modules; it fits nothing, so the adapter is for another one: give its base model"
    )
  module = re.sub(r"\.(base_layer\..*|lora_.*|[^.]*)$", "", name.removeprefix(_PREFIX))
  raise UserError(
    f"{where} belongs to {module!r}: only the factors lora_A and lora_B of linear layers are supported, no "
    "embeddings, biases, norms or whole weights; train an adapter without it"
  )


def _factors(folder, tensors, module, values, sizes, rank):
  """A [inputs, rank] and B [rank, outputs] of one layer, filled up with 0."""
  inputs, outputs = sizes
  if not values.targets(module):
    return np.zeros((inputs, rank), np.float32), np.zeros((rank, outputs), np.float32)
  own, found = values.rank(module), []
  for factor, shape in (("lora_A", (own, inputs)), ("lora_B", (outputs, own))):
    name = f"{_PREFIX}{module}.{factor}.weight"
    if name not in tensors:
      raise UserError(
        f"{folder}: tensor {name!r} is missing, though target_modules names its layer; write the adapter "
        "again"
      )
    if tensors[name].shape != shape:
      raise UserError(
        f"{folder}: tensor {name!r} has shape {tensors[name].shape}, this model needs {shape}; the "
        "adapter is for another one, so give its base model"
      )
    found.append(tensors[name].T)
  if own == rank:
    return found
  return np.pad(found[0], ((0, 0), (0, rank - own))), np.pad(found[1], ((0, rank - own), (0, 0)))
