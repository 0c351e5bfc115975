"""Configuration of a Llama: its sizes, published models by name, and Hugging Face's `config.json`."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from hamu_jax import outside
from hamu_jax.errors import UserError

CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's scaling of the low frequencies of the rotary embedding; see `rotary.rotary_angles`.

  Attributes:
    factor: number by which the lowest frequencies are divided.
    low_freq_factor: number of turns in the original context below which a frequency is divided.
    high_freq_factor: number of turns above which a frequency is kept. Between the two it is interpolated.
    original_max_position_embeddings: number of tokens of the original context.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """The sizes of a Llama, named as in Hugging Face's `config.json`.

  Attributes:
    vocab_size: V, number of tokens of the vocabulary.
    hidden_size: D, width of the residual stream.
    intermediate_size: F, width inside the SwiGLU.
    num_hidden_layers: L, number of layers.
    num_attention_heads: N, number of query heads.
    num_key_value_heads: K, number of key and value heads; each serves N / K query heads.
    head_dim: H, width of a head.
    rms_norm_eps: constant added to the mean square.
    rope_theta: base of the rotary frequencies.
    rope_scaling: Llama 3's scaling of the frequencies, or None.
    max_position_embeddings: number of tokens of the context.
    tie_word_embeddings: whether the output matrix is the embedding.
    bos_token_id: token that starts a text, or None.
    eos_token_ids: tokens each of which ends a text.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rms_norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  max_position_embeddings: int = 2048
  tie_word_embeddings: bool = False
  bos_token_id: int | None = 1
  eos_token_ids: tuple[int, ...] = (2,)

  def __post_init__(self):
    if self.num_attention_heads % self.num_key_value_heads:
      raise UserError(
        f"num_attention_heads={self.num_attention_heads}: choose a multiple of "
        f"num_key_value_heads={self.num_key_value_heads}"
      )
    if self.head_dim % 2:
      raise UserError(f"head_dim={self.head_dim}: choose an even number, as rotary embedding rotates pairs")


_LLAMA3_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)
_LLAMA32_SCALING = dataclasses.replace(_LLAMA3_SCALING, factor=32.0)
_LLAMA2 = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, max_position_embeddings=4096)
_LLAMA3 = LlamaConfig(
  128256,
  4096,
  14336,
  32,
  32,
  8,
  128,
  rope_theta=5e5,
  max_position_embeddings=8192,
  bos_token_id=128000,
  eos_token_ids=(128001, 128009),
)
_LLAMA31 = dataclasses.replace(
  _LLAMA3,
  rope_scaling=_LLAMA3_SCALING,
  max_position_embeddings=131072,
  eos_token_ids=(128001, 128008, 128009),
)
_LLAMA32 = dataclasses.replace(_LLAMA31, rope_scaling=_LLAMA32_SCALING, tie_word_embeddings=True)
_SMOLLM2 = LlamaConfig(
  49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, max_position_embeddings=8192, tie_word_embeddings=True
)

# Base and chat models have the same sizes.
PRESETS = {
  # Not a published model: a small one whose tokens are bytes, for tests and short runs.
  "tiny": LlamaConfig(
    264, 64, 160, 2, 4, 2, 16, tie_word_embeddings=True, bos_token_id=256, eos_token_ids=(257,)
  ),
  "llama2_7b": _LLAMA2,
  "llama2_13b": dataclasses.replace(
    _LLAMA2,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
  ),
  "llama3_8b": _LLAMA3,
  "llama31_8b": _LLAMA31,
  "llama32_1b": dataclasses.replace(
    _LLAMA32, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64
  ),
  "llama32_3b": dataclasses.replace(
    _LLAMA32, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24
  ),
  "tinyllama_1b": LlamaConfig(32000, 2048, 5632, 22, 32, 4, 64),
  "smollm2_135m": _SMOLLM2,
  "smollm2_360m": dataclasses.replace(
    _SMOLLM2,
    hidden_size=960,
    intermediate_size=2560,
    num_hidden_layers=32,
    num_attention_heads=15,
    num_key_value_heads=5,
  ),
  "smollm2_1b7": dataclasses.replace(
    _SMOLLM2,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=32,
    rope_theta=130000.0,
  ),
}

_SIZES = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
)
# Fields of which this Llama implements only one value, which is also Hugging Face's default.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def read_config(path: str | pathlib.Path) -> LlamaConfig:
  """Reads the `config.json` of a Hugging Face folder.

  Args:
    path: the folder, or the file itself.

  Returns:
    The configuration.

  Raises:
    UserError: if the file is missing, is not JSON, or describes a model that is not supported.
  """
  file = pathlib.Path(path)
  if file.is_dir() or file.suffix != ".json":
    file /= CONFIG_FILE
  values = outside.read_json(file, dict, f"give the folder of a Llama, with {CONFIG_FILE} and *.safetensors")
  try:
    return from_hugging_face(values)
  except UserError as error:
    raise UserError(f"{file}: {error}") from None


def from_hugging_face(values: Mapping[str, Any]) -> LlamaConfig:
  """Converts the JSON object of a Hugging Face `config.json`.

  The rotary embedding may be given in the old form (`rope_theta`, and `rope_scaling` with `type` or
  `rope_type`) or in the new one (`rope_parameters`).

  Args:
    values: the file's JSON object.

  Returns:
    The configuration.

  Raises:
    UserError: if the architecture is not Llama, a size is missing, or a value is not supported.
  """
  if values.get("model_type") != "llama":
    raise UserError(
      f"model_type={values.get('model_type')!r} is not supported, only 'llama' is; choose a Llama 2 or 3,"
      " TinyLlama or SmolLM2"
    )
  for field, only in _FIXED.items():
    if values.get(field, only) != only:
      raise UserError(f"{field}={values[field]!r} is not supported, only {only!r} is")
  sizes = {field: _size(field, values.get(field)) for field in _SIZES}
  heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
  tied = values.get("tie_word_embeddings", False)
  if not isinstance(tied, bool):
    raise UserError(f"tie_word_embeddings={tied!r}: true or false is needed")
  bos, eos = values.get("bos_token_id", 1), values.get("eos_token_id", 2)
  ends = () if eos is None else eos if isinstance(eos, list) else (eos,)
  theta, scaling = _rope(values)
  return LlamaConfig(
    **sizes,
    num_key_value_heads=_size("num_key_value_heads", values.get("num_key_value_heads") or heads),
    head_dim=_size("head_dim", values.get("head_dim") or width // heads),
    rms_norm_eps=_positive("rms_norm_eps", values.get("rms_norm_eps", 1e-6)),
    rope_theta=theta,
    rope_scaling=scaling,
    max_position_embeddings=_size("max_position_embeddings", values.get("max_position_embeddings", 2048)),
    tie_word_embeddings=tied,
    bos_token_id=None if bos is None else _size("bos_token_id", bos, least=0),
    eos_token_ids=tuple(_size("eos_token_id", token, least=0) for token in ends),
  )


def to_hugging_face(config: LlamaConfig, dtype: str) -> dict[str, Any]:
  """Builds the JSON object of a `config.json`, in the old form, which all versions read.

  Args:
    config: configuration of the model.
    dtype: name of the weights' type, such as "bfloat16".

  Returns:
    The JSON object.
  """
  values = dataclasses.asdict(config)
  eos = values.pop("eos_token_ids")
  scaling = values.pop("rope_scaling")
  return (
    _FIXED
    | values
    | {
      "architectures": ["LlamaForCausalLM"],
      "model_type": "llama",
      "torch_dtype": dtype,
      "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
      "rope_scaling": scaling and {"rope_type": "llama3"} | scaling,
    }
  )


def _size(field: str, value: Any, least: int = 1) -> int:
  if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
    raise UserError(f"{field}={value!r}: a whole number of at least {least} and below 2^31 is needed")
  return value


def _positive(field: str, value: Any) -> float:
  if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
    raise UserError(f"{field}={value!r}: a number above 0 is needed")
  return float(value)


def _rope(values) -> tuple[float, RopeScaling | None]:
  """Reads (rope_theta, rope_scaling) from either form."""
  new = values.get("rope_parameters")
  field, scaling = ("rope_parameters", new) if new else ("rope_scaling", values.get("rope_scaling"))
  scaling = scaling or {}
  if not isinstance(scaling, dict):
    raise UserError(f"{field}={scaling!r}: a JSON object is needed")
  theta = _positive("rope_theta", scaling.get("rope_theta", values.get("rope_theta", 10000.0)))
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise UserError(f"{field} of type {kind!r} is not supported, only 'default' and 'llama3' are")
  names = [part.name for part in dataclasses.fields(RopeScaling)]
  if missing := [name for name in names if name not in scaling]:
    raise UserError(f"{field} of type 'llama3' lacks {missing[0]!r}")
  factors = {name: _positive(f"{field}.{name}", scaling[name]) for name in names[:-1]}
  length = _size(f"{field}.{names[-1]}", scaling[names[-1]])
  return theta, RopeScaling(**factors, original_max_position_embeddings=length)
