"""Reads PEFT's `adapter_config.json`: which linear layers an adapter changes, with which rank and scale.

Source: `LoraConfig`, `check_target_module_exists` and `get_pattern_key` of PEFT 0.21.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from hamu_jax import outside
from hamu_jax.errors import UserError

CONFIG_FILE = "adapter_config.json"
_REMEDY = "give the folder of a PEFT adapter"
# PEFT's "all-linear" leaves the output layer out.
_OUTPUT = "lm_head"
# Features that are not supported, with the value of each that turns it off. Other programs write an empty
# list or object where PEFT writes null.
_OFF: dict[str, Any] = {
  "alora_invocation_tokens": None,
  "arrow_config": None,
  "ensure_weight_tying": False,
  "kasa_config": None,
  "layer_replication": None,
  "lora_bias": False,
  "megatron_config": None,
  "modules_to_save": None,
  "monteclora_config": None,
  "target_parameters": None,
  "trainable_token_indices": None,
  "use_bdlora": None,
  "use_dora": False,
  "use_qalora": False,
  "velora_config": None,
}
# Features of which an adapter says that it does not use them; versions of PEFT refuse fields that they do not
# know.
_WRITTEN = (
  "alora_invocation_tokens",
  "layer_replication",
  "lora_bias",
  "modules_to_save",
  "target_parameters",
  "trainable_token_indices",
  "use_dora",
  "use_qalora",
)
# Fields that change no output of a trained adapter. `fan_in_fan_out` is one of them, since PEFT turns it off
# for linear layers. The configurations of initializations are, too, since `_PLAIN_STARTS` refuses those that
# change the base.
_HARMLESS = {
  "auto_mapping",
  "base_model_name_or_path",
  "corda_config",
  "eva_config",
  "fan_in_fan_out",
  "inference_mode",
  "loftq_config",
  "lora_ga_config",
  "megatron_core",
  "peft_version",
  "qalora_group_size",
  "revision",
  "runtime_config",
  "task_type",
}
_READ = {
  "alpha_pattern",
  "bias",
  "exclude_modules",
  "init_lora_weights",
  "layers_pattern",
  "layers_to_transform",
  "lora_alpha",
  "lora_dropout",
  "peft_type",
  "r",
  "rank_pattern",
  "target_modules",
  "use_rslora",
}
# Other initializations, such as "pissa", subtract the first factors from the base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# For `bias`, PEFT stores biases of the base, which no supported model has; `lora_weights` refuses them.
_BIASES = ("none", "all", "lora_only")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
  """The fields of a LoRA adapter that say what it computes, as PEFT names them.

  Modules are named as in the base model: "model.layers.0.self_attn.q_proj".
  """

  r: int
  lora_alpha: float
  lora_dropout: float
  use_rslora: bool
  target_modules: str | tuple[str, ...]
  exclude_modules: str | tuple[str, ...]
  layers_to_transform: tuple[int, ...]
  layers_pattern: tuple[str, ...]
  rank_pattern: Mapping[str, int]
  alpha_pattern: Mapping[str, float]
  base_model: str

  def targets(self, module: str) -> bool:
    """Whether the adapter changes this linear layer."""
    if _names(self.exclude_modules, module):
      return False
    if self.target_modules == "all-linear":
      return module != _OUTPUT
    if not _names(self.target_modules, module):
      return False
    # A name in full, or a regular expression, is not restricted to layers.
    if isinstance(self.target_modules, str) or module in self.target_modules or not self.layers_to_transform:
      return True
    patterns = self.layers_pattern or ("[^.]*",)
    found = next(filter(None, (re.match(rf".*\.{each}\.(\d+)\.", module) for each in patterns)), None)
    return found is not None and int(found[1]) in self.layers_to_transform

  def rank(self, module: str) -> int:
    """Number of columns of this layer's A."""
    return _of_pattern(self.rank_pattern, module, self.r)

  def scaling(self, module: str) -> float:
    """The factor of this layer's A B: alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA."""
    rank, alpha = self.rank(module), _of_pattern(self.alpha_pattern, module, self.lora_alpha)
    return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read(folder: pathlib.Path) -> PeftConfig:
  """Reads the configuration of the adapter in a folder.

  Args:
    folder: folder with `adapter_config.json`.

  Returns:
    The configuration.

  Raises:
    UserError: if the file is missing or damaged, or the adapter is no LoRA, uses a feature that is not
      supported, or has a field that is not known to be harmless.
  """
  file = folder / CONFIG_FILE
  values = outside.read_json(file, dict, _REMEDY)
  if values.get("peft_type") != "LORA":
    raise UserError(f"{file}: not a LoRA adapter; its peft_type must be 'LORA'")
  _check_features(file, values)
  for field in ("r", "lora_alpha", "target_modules"):
    if values.get(field) is None:
      raise UserError(f"{file}: lacks {field!r}; write the adapter again")
  with outside.read_of(file, "a configuration of PEFT", "write the adapter again"):
    return _checked(values)


def written(
  *, rank: int, alpha: float, dropout: float, targets: tuple[str, ...], base_model: str
) -> dict[str, Any]:
  """Builds the JSON object that PEFT and vLLM read.

  Args:
    rank: number of columns of A.
    alpha: numerator of the scale alpha / rank.
    dropout: share of the inputs that the adapter drops in training.
    targets: names of the adapted linear layers.
    base_model: folder or hub id of the base model; "" for none.
  """
  off = {name: value for name, value in _OFF.items() if name in _WRITTEN}
  return off | {
    "alpha_pattern": {},
    "base_model_name_or_path": base_model or None,
    "bias": "none",
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "lora_alpha": alpha,
    "lora_dropout": dropout,
    "peft_type": "LORA",
    "r": rank,
    "rank_pattern": {},
    "target_modules": list(targets),
    "task_type": "CAUSAL_LM",
    "use_rslora": False,
  }


def _check_features(file: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Refuses a feature that is not supported, and a field of which nothing is known."""
  for field, value in values.items():
    if field in _OFF:
      if value not in (_OFF[field], None, False, [], {}):
        raise UserError(
          f"{file}: {field}={value!r} is not supported, only {_OFF[field]!r} is; train an adapter without it"
        )
    elif field not in _HARMLESS | _READ and value not in (None, False, [], {}):
      raise UserError(
        f"{file}: the field {field}={value!r} is unknown, and may change what the adapter computes; "
        "merge the adapter with the program that wrote it, or set the field to null if it changes nothing"
      )
  start = values.get("init_lora_weights", True)
  if start not in _PLAIN_STARTS:
    raise UserError(
      f"{file}: init_lora_weights={start!r} has changed the base model's weights; save the adapter with "
      "PEFT's path_initial_model_for_weight_conversion, which makes it one of the original base"
    )
  if values.get("bias", "none") not in _BIASES:
    raise UserError(f"{file}: bias={values['bias']!r}: choose from {', '.join(_BIASES)}")


def _checked(values: Mapping[str, Any]) -> PeftConfig:
  """The configuration; anything raised here says that the file is wrong."""
  layers = values.get("layers_to_transform")
  patterns = values.get("layers_pattern") or ()
  config = PeftConfig(
    r=_integer("r", values["r"]),
    lora_alpha=_finite("lora_alpha", values["lora_alpha"]),
    lora_dropout=float(values.get("lora_dropout") or 0.0),
    use_rslora=bool(values.get("use_rslora")),
    target_modules=_modules("target_modules", values["target_modules"]),
    exclude_modules=_modules("exclude_modules", values.get("exclude_modules") or ()),
    layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers or ()),
    layers_pattern=(patterns,) if isinstance(patterns, str) else tuple(patterns),
    rank_pattern={
      key: _integer("rank_pattern", rank) for key, rank in (values.get("rank_pattern") or {}).items()
    },
    alpha_pattern={
      key: _finite("alpha_pattern", alpha) for key, alpha in (values.get("alpha_pattern") or {}).items()
    },
    base_model=values.get("base_model_name_or_path") or "",
  )
  if not isinstance(config.base_model, str):
    raise ValueError(f"base_model_name_or_path={config.base_model!r} is not a name")
  # A regular expression that cannot be compiled is found here, not at the first layer.
  for pattern in (*config.rank_pattern, *config.alpha_pattern, *config.layers_pattern):
    re.compile(pattern)
  for modules in (config.target_modules, config.exclude_modules):
    if isinstance(modules, str):
      re.compile(modules)
  return config


def _integer(field: str, value: Any) -> int:
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise ValueError(f"{field}={value!r}: a whole number of at least 1 is needed")
  return value


def _finite(field: str, value: Any) -> float:
  if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
    raise ValueError(f"{field}={value!r}: a finite number is needed")
  return value


def _modules(field: str, value: Any) -> str | tuple[str, ...]:
  if isinstance(value, str):
    return value
  if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
    raise ValueError(f"{field}={value!r}: names or a regular expression are needed")
  return tuple(value)


def _names(modules: str | tuple[str, ...], module: str) -> bool:
  """Whether a regular expression, or one of several names or ends of names, names a module."""
  if isinstance(modules, str):
    return re.fullmatch(modules, module) is not None
  return any(module == name or module.endswith(f".{name}") for name in modules)


def _of_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
  """The value of the first key that matches the end of a module's name."""
  key = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)
  return default if key is None else pattern[key]
