"""Adapters in PEFT's format: a folder with `adapter_config.json` and `adapter_model.safetensors`.

In this project factors are stacked over layers and are [inputs, r] and [r, outputs]. In PEFT's format each
layer has its own factors, and they are [r, inputs] and [outputs, r].
"""

import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from hamu_jax.errors import UserError
from hamu_jax.models import llama_weights
from hamu_jax.models.lora import LoraConfig

Tree = Any

_CONFIG = "adapter_config.json"
_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Features of PEFT that are not supported here, with the value of each that turns it off.
_UNSUPPORTED: dict[str, Any] = {
  "alora_invocation_tokens": None,
  "alpha_pattern": {},
  "bias": "none",
  "exclude_modules": None,
  "fan_in_fan_out": False,
  "layer_replication": None,
  "layers_to_transform": None,
  "lora_bias": False,
  "modules_to_save": None,
  "rank_pattern": {},
  "target_parameters": None,
  "trainable_token_indices": None,
  "use_dora": False,
  "use_qalora": False,
  "use_rslora": False,
}


def load_adapter(path: str | os.PathLike, params: Tree) -> tuple[LoraConfig, Tree]:
  """Reads an adapter of a Llama.

  Args:
    path: the folder.
    params: parameters of the base model, or their shapes.

  Returns:
    (configuration, values). The values are NumPy arrays in the form of `lora.init` and the file's dtype.

  Raises:
    UserError: if a file is missing or damaged, or the adapter uses an unsupported feature or is for another
      model.
  """
  folder = pathlib.Path(path)
  values = _read_config(folder / _CONFIG)
  tensors = _read_tensors(folder / _FILE)
  rank = values["r"]
  layers = params["layers"]["input_layernorm"]["scale"].shape[0]
  adapter, known = {}, set()
  for kernel, leaf in traverse_util.flatten_dict(params).items():
    names = _names(kernel[:-1], layers) if kernel[-1] == "kernel" else {}
    if not any(name in tensors for parts in names.values() for name in parts):
      continue
    inputs, outputs = leaf.shape[-2:]
    for factor, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
      parts = names[factor]
      for name in parts:
        _check(folder, name, tensors, shape)
      known.update(parts)
      stack = [tensors[name].T for name in parts]
      adapter[*kernel[:-1], factor] = np.stack(stack) if kernel[0] == "layers" else stack[0]
  if unknown := sorted(set(tensors) - known):
    raise UserError(
      f"{folder}: tensor {unknown[0]!r} fits nothing in this model ({len(unknown)} in all); the "
      "adapter is for another one, so give its base model"
    )
  config = LoraConfig(
    rank=rank, alpha=values["lora_alpha"], dropout=values.get("lora_dropout", 0.0), targets=_targets(adapter)
  )
  return config, traverse_util.unflatten_dict(adapter)


def fingerprint(path: str | os.PathLike) -> str:
  """Computes the SHA-256, in hexadecimal, of an adapter's files.

  Raises:
    UserError: if a file is missing.
  """
  digest = hashlib.sha256()
  for name in (_CONFIG, _FILE):
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
  values = _UNSUPPORTED | {
    "base_model_name_or_path": base_model or None,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": config.alpha,
    "lora_dropout": config.dropout,
    "peft_type": "LORA",
    "r": config.rank,
    "target_modules": list(_targets(flat)),
    "task_type": "CAUSAL_LM",
  }
  folder = pathlib.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    llama_weights.write_safetensors(folder / _FILE, tensors)
    (folder / _CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
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


def _read_config(file):
  try:
    values = json.loads(file.read_text())
  except OSError as error:
    raise UserError(f"{file}: cannot be read ({error.strerror}); give the folder of a PEFT adapter") from None
  except ValueError as error:
    raise UserError(f"{file}: not JSON ({error}); write the adapter again") from None
  if not isinstance(values, dict) or values.get("peft_type") != "LORA":
    raise UserError(f"{file}: not a LoRA adapter; its peft_type must be 'LORA'")
  for field, off in _UNSUPPORTED.items():
    if values.get(field, off) != off:
      raise UserError(
        f"{file}: {field}={values[field]!r} is not supported, only {off!r} is; train an adapter without it"
      )
  if missing := [field for field in ("r", "lora_alpha") if field not in values]:
    raise UserError(f"{file}: lacks {missing[0]!r}; write the adapter again")
  return values


def _read_tensors(file):
  if not file.is_file():
    raise UserError(f"{file}: no such file; give the folder of a PEFT adapter")
  try:
    return safetensors.numpy.load_file(file)
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f"{file}: not a safetensors file ({error}); write the adapter again") from None


def _check(folder, name, tensors, shape):
  if name not in tensors:
    raise UserError(
      f"{folder}: tensor {name!r} is missing; adapt a projection in all layers or in none, with both factors"
    )
  if tensors[name].shape != shape:
    raise UserError(
      f"{folder}: tensor {name!r} has shape {tensors[name].shape}, this model needs {shape}; the "
      "adapter is for another one, so give its base model"
    )
