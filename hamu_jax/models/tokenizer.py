"""Tokenizers with chat templates, from a folder, from a GGUF file, or with bytes as tokens.

The `tokenizers` library encodes and decodes; `transformers` reads and writes folders and runs chat
templates in a sandbox. Neither needs PyTorch.
"""

import functools
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from hamu_jax import outside
from hamu_jax.errors import UserError
from hamu_jax.models import bpe, chat_template, llama_gguf

TOKENIZER_FILE = "tokenizer.json"

_CONFIG_FILE = "tokenizer_config.json"
# Files that name the tokens that end a text; the first one in a model's folder counts.
_EOS_FILES = ("generation_config.json", "config.json")
# Some templates write today's date into the prompt, but training data must not change from day to day. So
# templates get the date that is Llama 3's fallback. Jinja drops the newline after a block, so this extra
# line does not change the rest of a template.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"
BYTE_TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}"
  "{% if message.role == 'assistant' %}{{ 'A: ' + message.content + eos_token }}"
  "{% else %}{{ ('Q: ' if message.role == 'user' else '') + message.content + '\n' }}{% endif %}"
  "{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


class Tokenizer:
  """A tokenizer with its special tokens and its chat template.

  Attributes:
    eos_token_ids: tokens each of which ends a text, at least one; the first is the one to write.
    bos_token_id: token that starts every text, or None if the tokenizer adds no such token.
    pad_token_id: token that fills batches; the end-of-text token if the tokenizer has no padding token.
    vocab_size: number of tokens, special ones included. A model's embedding may have more rows.

  Args:
    fast: a `transformers.PreTrainedTokenizerFast`.
    eos_token_ids: further tokens that end a text, in addition to the tokenizer's own.
    where: name of the tokenizer in error messages.

  Raises:
    UserError: if no token ends a text.
  """

  def __init__(self, fast, eos_token_ids: Iterable[int] = (), where: str = "the tokenizer"):
    self._fast, self._where = fast, where
    self._backend = fast.backend_tokenizer
    # A file may contain the padding and truncation settings of the program that saved it.
    self._backend.no_padding()
    self._backend.no_truncation()
    own = () if fast.eos_token_id is None else (fast.eos_token_id,)
    self.eos_token_ids = tuple(dict.fromkeys((*own, *eos_token_ids)))
    if not self.eos_token_ids:
      raise UserError(f"{where}: has no end-of-text token; set eos_token in {_CONFIG_FILE}")
    starts = fast.bos_token_id is not None and self._backend.encode("a").ids[0] == fast.bos_token_id
    self.bos_token_id = fast.bos_token_id if starts else None
    self.pad_token_id = self.eos_token_ids[0] if fast.pad_token_id is None else fast.pad_token_id
    self.vocab_size = self._backend.get_vocab_size()

  def encode(self, text: str) -> list[int]:
    """Token ids of a text.

    No special token is added, but those that the text spells out, such as "<|im_start|>", are recognised.
    """
    return self._backend.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Applies `encode` to each text, on all cores."""
    encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [each.ids for each in encoded]

  def decode(self, ids: Iterable[int]) -> str:
    """Decodes token ids into text, without special tokens."""
    return self._backend.decode([int(token) for token in ids])

  def decode_batch(self, rows: Iterable[Iterable[int]]) -> list[str]:
    """Applies `decode` to each row, on all cores."""
    return self._backend.decode_batch([[int(token) for token in ids] for ids in rows])

  def chat_prompt(self, question: str, system: str | None = None) -> str:
    """Renders the chat template up to the position at which the model's answer begins.

    Args:
      question: the user's message.
      system: the system message; None leaves it to the template, which may have its own.

    Returns:
      The text.

    Raises:
      UserError: if there is no chat template, or it refuses the messages.
    """
    return self._render(_messages(question, system), add_generation_prompt=True)

  def chat(self, question: str, answer: str, system: str | None = None) -> str:
    """Renders the chat template of a question with its answer; see `chat_prompt`."""
    answered = {"role": "assistant", "content": answer}
    return self._render([*_messages(question, system), answered], add_generation_prompt=False)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256, in hexadecimal, of the definition, the special tokens and the chat template."""
    parts = [
      self._backend.to_str(),
      self._fast.chat_template,
      self.bos_token_id,
      self.eos_token_ids,
      self.pad_token_id,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the files from which `from_folder` and `transformers.AutoTokenizer` read it back.

    The files name only the first of several end-of-text tokens; the model's `config.json` in
    the same folder lists all.
    """
    self._fast.save_pretrained(folder)
    # transformers 4 does not know the class name that transformers 5 writes; both know the old name. The old
    # name also keeps them from replacing the file's definition by that of a model-specific class.
    file = pathlib.Path(folder) / _CONFIG_FILE
    values = json.loads(file.read_text())
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")

  def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    if self._fast.chat_template is None:
      raise UserError(
        f"config.text.template='chat': {self._where} has no chat template; choose 'llama2',"
        " 'question_answer' or 'none'"
      )
    roles = ", ".join(message["role"] for message in messages)
    return chat_template.render(
      lambda: self._fast.apply_chat_template(
        messages,
        chat_template=self._template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
      ),
      self._where,
      f"messages of {roles}",
    )

  @functools.cached_property
  def _template(self) -> str:
    template = self._fast.get_chat_template()
    chat_template.check(template, self._where)
    return _FIXED_DATE + template


def from_folder(path: str | os.PathLike) -> Tokenizer:
  """Reads the tokenizer of a Hugging Face folder.

  `tokenizer.json` is used unchanged, whatever class the folder names. Without it, transformers builds a
  tokenizer from other files, such as `tokenizer.model`. Code in the folder is never run. The end-of-text
  tokens are the tokenizer's own and those of the model's configuration.

  Args:
    path: the folder.

  Returns:
    The tokenizer.

  Raises:
    UserError: if the folder does not exist, or has no tokenizer that can be read.
  """
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise UserError(f"{path}: no such folder; give the folder of a model, with {TOKENIZER_FILE}")
  transformers = _import_transformers()
  as_it_stands = (folder / TOKENIZER_FILE).is_file()
  loader = transformers.PreTrainedTokenizerFast if as_it_stands else transformers.AutoTokenizer
  remedy = f"put {TOKENIZER_FILE} and {_CONFIG_FILE} of the model there"
  with outside.read_of(folder, "a folder with a tokenizer", remedy):
    fast = loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
  if not hasattr(fast, "backend_tokenizer"):
    raise UserError(
      f"{folder}: its tokenizer ({type(fast).__name__}) has no {TOKENIZER_FILE}, which is needed; put that"
      " file of the model there"
    )
  return Tokenizer(fast, _eos_of_model(folder), str(folder))


def from_gguf(path: str | os.PathLike, reader: Any = None) -> Tokenizer:
  """Builds the tokenizer that the metadata of a GGUF file describe.

  Supported are byte-level tokenizers (SmolLM2, Llama 3, GPT-2) and SentencePiece's (Llama 2, TinyLlama).

  Args:
    path: path of the file.
    reader: the file's reader from `llama_gguf.open_reader`, which is slow; None opens the file.

  Returns:
    The tokenizer.

  Raises:
    UserError: if the file is not a GGUF file, its tokenizer is not supported, or the `gguf` package is not
      installed.

  Source: `convert_hf_to_gguf.py` and `llama-vocab.cpp` of llama.cpp, for the names of fields.
  """
  reader = reader or llama_gguf.open_reader(path)
  with outside.read_of(path, "a GGUF file with a tokenizer", "give the model's folder"):
    return _of_fields(_gguf_fields(reader), path)


def _of_fields(fields: dict, path: str | os.PathLike) -> Tokenizer:
  """The tokenizer of the fields of a GGUF file."""

  def need(name):
    if name not in fields:
      raise UserError(
        f"{path}: the GGUF file lacks the field 'tokenizer.ggml.{name}'; give the model's folder"
      )
    return fields[name]

  kind, tokens = need("model"), need("tokens")
  if kind == "gpt2":
    words = need("pre")
    backend = bpe.byte_pairs(tokens, need("merges"), words, path)
    starts = words in bpe.LLAMA3_WORDS
  elif kind == "llama":
    backend = bpe.sentence_piece(
      tokens, need("scores"), need("unknown_token_id"), fields.get("add_space_prefix", True)
    )
    starts = True
  else:
    raise UserError(
      f"{path}: has a tokenizer of kind {kind!r}; only 'gpt2' (byte-level) and 'llama'"
      " (SentencePiece) can be built from a GGUF file, so give the model's folder"
    )
  bpe.add_special(backend, tokens, fields.get("token_type", ()))
  roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
  special = {
    f"{role}_token": tokens[fields[f"{name}_token_id"]]
    for role, name in roles.items()
    if f"{name}_token_id" in fields
  }
  bos = special.get("bos_token") if fields.get("add_bos_token", starts) else None
  fast = _fast(backend, bos, fields.get("chat_template"), special)
  ends = [fields[name] for name in ("eot_token_id", "eom_token_id") if name in fields]
  return Tokenizer(fast, ends, str(path))


def byte_tokenizer() -> Tokenizer:
  """A tokenizer without files: token b is byte b of UTF-8, then come <bos> 256, <eos> 257, <pad> 258.

  Its chat template is "<bos>Q: {question}\\nA: {answer}<eos>", with a system message on a line before the
  question.
  """
  from tokenizers import models

  special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
  vocab = {character: byte for byte, character in enumerate(bpe.byte_alphabet())}
  backend = bpe.byte_level(models.BPE(vocab=vocab, merges=[]), (), gpt2_words=False)
  return Tokenizer(_fast(backend, "<bos>", BYTE_TEMPLATE, special), where="the byte tokenizer")


def _messages(question: str, system: str | None) -> list[dict[str, str]]:
  first = [] if system is None else [{"role": "system", "content": system}]
  return [*first, {"role": "user", "content": question}]


def _eos_of_model(folder: pathlib.Path) -> tuple[int, ...]:
  """End-of-text tokens of the model's configuration; Llama 3 has more than one."""
  for name in _EOS_FILES:
    file = folder / name
    if not file.is_file():
      continue
    ids = outside.read_json(file, dict, "download it again").get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(token, int) for token in ids):
      raise UserError(f"{file}: eos_token_id={ids!r}: whole numbers are needed")
    if ids:
      return tuple(ids)
  return ()


def _import_transformers():
  """Imports transformers without its advice to install PyTorch, which is not needed here."""
  log = logging.getLogger("transformers")
  others = lambda record: "PyTorch was not found" not in record.getMessage()
  log.addFilter(others)
  try:
    import transformers
  finally:
    log.removeFilter(others)
  return transformers


def _fast(backend, bos: str | None, template: str | None, special: dict[str, str]):
  """Wraps a `tokenizers.Tokenizer`; `bos`, unless it is None, starts every text."""
  from tokenizers import processors

  fast = _import_transformers().PreTrainedTokenizerFast(
    tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
  )
  fast.chat_template = template
  if bos is not None:
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
      single=[bos, "$A"], special_tokens=[(bos, fast.bos_token_id)]
    )
  return fast


def _gguf_fields(reader) -> dict:
  """Values of a GGUF file's `tokenizer.ggml.*` and `tokenizer.chat_template`, by last name."""
  prefixes = ("tokenizer.ggml.", "tokenizer.chat_template")
  return {
    name.rpartition(".")[-1]: field.contents()
    for name, field in reader.fields.items()
    if name.startswith(prefixes)
  }
