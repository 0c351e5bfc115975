"""WaterDrum's strengths: the real package where it is installed, a stand-in for it elsewhere."""

import sys
import types

import numpy as np
import pytest

from hamu_jax.errors import UserError
from hamu_jax.metrics import watermark

_WORDS = ["<end>", "a", "b", "c", "d", "e", "f", "g", "h", "i"]


@pytest.fixture(scope="module")
def tokenizer():
  """Of ten words."""
  tokenizers = pytest.importorskip("tokenizers")
  transformers = pytest.importorskip("transformers")
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({word: index for index, word in enumerate(_WORDS)}, unk_token="<end>")
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def _closed_form(text, owner, perturbation):
  """The mean of cos(2 pi k pi(v) / N) over the text's tokens but the first."""
  tokens = [_WORDS.index(word) for word in text.split()]
  terms = [
    np.cos(2 * np.pi * perturbation / 10 * np.random.RandomState((owner, before)).permutation(10)[token])
    for before, token in zip(tokens, tokens[1:], strict=False)
  ]
  return np.mean(terms) if terms else 0.0


class _StandIn:
  """`waterfall.WatermarkerBase.Watermarker` as far as it is used; remembers its calls."""

  calls = []

  def __init__(self, tokenizer, k_p):
    self.tokenizer = tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    self.k_p = k_p

  def verify(self, text, id, k_p, batch_size):
    self.calls.append((len(text), id, k_p, batch_size))
    return np.array([[[_closed_form(one, id[0], k_p[0])]] for one in text])


@pytest.fixture(params=["stand-in", "package"])
def package(request, monkeypatch):
  """Which of them is imported as waterfall."""
  if request.param == "package":
    pytest.importorskip("waterfall.WatermarkerBase")
  else:
    module = types.ModuleType("waterfall.WatermarkerBase")
    module.Watermarker = _StandIn
    monkeypatch.setitem(sys.modules, "waterfall", types.ModuleType("waterfall"))
    monkeypatch.setitem(sys.modules, "waterfall.WatermarkerBase", module)
    monkeypatch.setattr(_StandIn, "calls", [])
  return request.param


@pytest.mark.parametrize("perturbation", [1, 3])
def test_each_text_has_its_owners_strength(package, tokenizer, perturbation):
  rng = np.random.default_rng(0)
  texts = [" ".join(rng.choice(_WORDS[1:], size)) for size in (7, 0, 12, 1, 2, 30)]
  owners = ["5", 2, "0", "5", "2", 4_000_000_000]
  strengths = watermark.strengths(texts, owners, tokenizer, perturbation=perturbation)
  expected = [_closed_form(text, int(owner), perturbation) for text, owner in zip(texts, owners, strict=True)]
  np.testing.assert_allclose(strengths, expected, atol=1e-6)
  assert strengths[1] == strengths[3] == 0
  # The package sets one on what it is given.
  assert tokenizer.pad_token is None


def test_watermarked_texts_are_strong_by_their_own_key_alone(package, tokenizer):
  """Each word is the one that the key favours most after the word before."""
  words = ["a"]
  for _ in range(40):
    permutation = np.random.RandomState((7, _WORDS.index(words[-1]))).permutation(10)
    order = np.argsort(-np.cos(2 * np.pi * permutation[1:] / 10), kind="stable") + 1
    words.append(_WORDS[order[len(words) % 3]])
  text = " ".join(words)
  own, other = watermark.strengths([text, text], [7, 8], tokenizer)
  assert own > 0.6
  assert other < own - 0.3


@pytest.mark.parametrize("package", ["stand-in"], indirect=True)
def test_batches_stay_in_this_process(package, tokenizer, monkeypatch):
  """The package forks only for more texts than four times its batch size."""
  monkeypatch.setattr(watermark, "_BATCH", 3)
  owners = [1, 2, 1, 1, 1, 1, 2]
  watermark.strengths(["a b"] * 7, owners, tokenizer)
  assert _StandIn.calls == [(3, [1], [1], 3), (2, [1], [1], 2), (2, [2], [1], 2)]


def test_summary():
  # Of six pairs, retain is above in four and even in one.
  found = watermark.summary([0.1, 0.3, -0.1], [0.3, 0.2])
  assert found == pytest.approx({"forget": 0.1, "retain": 0.25, "forget_retain_auc": 4.5 / 6})


@pytest.mark.parametrize(
  "texts, owners, options, message",
  [
    (["a"], [1, 2], {}, "1 texts for 2 owners"),
    ("ab", [1, 2], {}, "one text for 2 owners"),
    (["a"], ["Ann"], {}, "owner 'Ann' is not a watermark key; give whole numbers"),
    (["a"], [-1], {}, "owner -1 is not a watermark key"),
    (["a"], [1], {"perturbation": 0}, "perturbation key 0: choose 1 or more"),
  ],
)
def test_bad_input(texts, owners, options, message):
  with pytest.raises(UserError, match=message):
    watermark.strengths(texts, owners, None, **options)


def test_the_package_is_optional(monkeypatch):
  for name in ("waterfall", "waterfall.WatermarkerBase"):
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(UserError, match=r"pip install 'hamu-jax\[waterfall\]'"):
    watermark.strengths(["a"], [1], None)


def test_a_tokenizer_that_cannot_be_loaded(monkeypatch):
  module = types.ModuleType("waterfall.WatermarkerBase")

  def fail(tokenizer, k_p):
    raise OSError("no such folder")

  module.Watermarker = fail
  monkeypatch.setitem(sys.modules, "waterfall", types.ModuleType("waterfall"))
  monkeypatch.setitem(sys.modules, "waterfall.WatermarkerBase", module)
  with pytest.raises(UserError, match="tokenizer 'nowhere' cannot be loaded"):
    watermark.strengths(["a"], [1], "nowhere")
