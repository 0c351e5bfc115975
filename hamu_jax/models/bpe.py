"""Byte-pair encodings built from their tokens and merges, over bytes and in SentencePiece's form.

Each function returns a `tokenizers.Tokenizer`.
"""

from hamu_jax.errors import UserError

# GGUF's names of the rules that split text into words before pairs are merged, for models with Llama's
# architecture.
_DIGIT_WORDS = ("smollm",)
LLAMA3_WORDS = ("llama-bpe", "llama3", "llama-v3")
_GPT2_WORDS = ("gpt-2",)
_LLAMA3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Values of GGUF's `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4


def byte_alphabet() -> list[str]:
  """GPT-2's character for each byte: the byte itself if printable, else the next code point from 256."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = iter(range(256, 512))
  return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_level(model, splits, gpt2_words: bool):
  """A tokenizer over bytes. `splits`, and then GPT-2's rule if `gpt2_words`, first split the text."""
  import tokenizers
  from tokenizers import decoders, pre_tokenizers

  backend = tokenizers.Tokenizer(model)
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2_words)
  backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
  backend.decoder = decoders.ByteLevel()
  return backend


def byte_pairs(tokens, merges, words: str, path):
  """GPT-2's byte-pair encoding over bytes; `words` names the rule that splits the text into words."""
  from tokenizers import Regex, models, pre_tokenizers

  splits: list[pre_tokenizers.PreTokenizer]
  if words in _DIGIT_WORDS:
    splits = [pre_tokenizers.Digits(individual_digits=True)]
  elif words in LLAMA3_WORDS:
    splits = [pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")]
  elif words in _GPT2_WORDS:
    splits = []
  else:
    raise UserError(
      f"{path}: splits text into words as {words!r}; a GGUF file's tokenizer can be built for"
      f" {', '.join((*_DIGIT_WORDS, *LLAMA3_WORDS, *_GPT2_WORDS))}; give the model's folder"
    )
  model = models.BPE(
    vocab={token: index for index, token in enumerate(tokens)},
    merges=[tuple(merge.split(" ")) for merge in merges],
    # In Llama 3, a word that is a token becomes that token, even if no merges lead to it.
    ignore_merges=words in LLAMA3_WORDS,
  )
  return byte_level(model, splits, gpt2_words=words not in LLAMA3_WORDS)


def sentence_piece(tokens, scores, unknown: int, space_prefix: bool):
  """SentencePiece's byte-pair encoding, which first merges the pair whose piece has the highest score."""
  import tokenizers
  from tokenizers import decoders, models, normalizers

  vocab = {token: index for index, token in enumerate(tokens)}
  merges = []
  for token, score in zip(tokens, scores, strict=True):
    for cut in range(1, len(token)):
      left, right = token[:cut], token[cut:]
      if left in vocab and right in vocab:
        merges.append((-score, vocab[token], vocab[left], left, right))
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=[merge[-2:] for merge in sorted(merges)],
      unk_token=tokens[unknown],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
  decoded = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  if space_prefix:
    spaces = [normalizers.Prepend("▁"), *spaces]
    decoded.append(decoders.Strip(" ", 1, 0))
  backend.normalizer = normalizers.Sequence(spaces)
  backend.decoder = decoders.Sequence(decoded)
  return backend


def add_special(backend, tokens, types) -> None:
  """Adds the tokens that are matched as a whole in a text; decoding leaves control tokens out."""
  from tokenizers import AddedToken

  def of(kind):
    return [
      AddedToken(token, normalized=False, special=kind == _CONTROL)
      for token, own in zip(tokens, types, strict=bool(types))
      if own == kind
    ]

  backend.add_special_tokens(of(_CONTROL))
  backend.add_tokens(of(_USER_DEFINED))
