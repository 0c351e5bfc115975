"""ROUGE recall of generated answers, with words of any script."""

import itertools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from hamu_jax.errors import UserError

WORDS = ("latin", "any")
# Thai and Lao, Burmese, Khmer, kana, Chinese characters.
_NO_SPACES = (
  "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
)


def rouge(
  predictions: Sequence[str], references: Sequence[str], *, words: str = "latin"
) -> dict[str, np.ndarray]:
  r"""Share of each reference's words that are in the prediction, in any order or in the same order.

  .. math::
    \text{ROUGE-1} = \frac{\sum_w \min(c_w^{\text{pred}}, c_w^{\text{ref}})}{|\text{ref}|}, \qquad
    \text{ROUGE-L} = \frac{|\operatorname{LCS}(\text{pred}, \text{ref})|}{|\text{ref}|}

  With "latin", words are runs of a-z and 0-9 in the lower-cased text, Porter-stemmed if longer than three
  characters. A reference that has no such words is compared by words of any script. The share is 0 if either
  text has no words.

  With "any", a word is a run of letters, marks and digits of any script. In scripts that are written without
  spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese), every character is a word. Words of a-z and 0-9 are
  stemmed as above.

  Args:
    predictions: N generated answers.
    references: N answers of the dataset.
    words: One of `WORDS`.

  Returns:
    ``{"rouge1_recall", "rougeL_recall"}``, each [N] in [0, 1].

  Raises:
    UserError: if the package rouge-score is not installed, there are no texts, or their numbers differ.

  Source: Lin, ROUGE (2004), as the package rouge-score computes it.
  """
  if words not in WORDS:
    raise UserError(f"ROUGE: words={words!r}; choose from {', '.join(WORDS)}")
  # A single text would be split into letters.
  for name, texts in (("predictions", predictions), ("references", references)):
    if isinstance(texts, str):
      raise UserError(f"ROUGE: {name} is one text; give a list of texts")
  if not len(predictions) or len(predictions) != len(references):
    raise UserError(
      f"ROUGE: {len(predictions)} predictions for {len(references)} references; "
      "give one prediction for each of at least one reference"
    )
  try:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer
  except ImportError as error:
    raise UserError("ROUGE needs rouge-score, which is not installed; pip install 'hamu-jax[llm]'") from error
  latin = DefaultTokenizer(use_stemmer=True)
  scorers = {
    "latin": RougeScorer(["rouge1", "rougeL"], tokenizer=latin),
    "any": RougeScorer(["rouge1", "rougeL"], tokenizer=_AnyScript(latin)),
  }
  scores = [
    scorers[words if latin.tokenize(reference) else "any"].score(target=reference, prediction=prediction)
    for prediction, reference in zip(predictions, references, strict=True)
  ]
  return {
    f"{kind}_recall": np.array([score[kind].recall for score in scores]) for kind in ("rouge1", "rougeL")
  }


class _AnyScript:
  """Words of any script, as a tokenizer of rouge-score."""

  def __init__(self, latin):
    self._latin = latin

  def tokenize(self, text: str) -> list[str]:
    words = []
    for is_word, characters in itertools.groupby(text.lower(), _is_of_word):
      run = "".join(characters)
      if is_word:
        # Between characters that are words by themselves, others form runs.
        parts = [part for part in re.split(f"([{_NO_SPACES}])", run) if part]
        words += [
          word for part in parts for word in (self._latin.tokenize(part) if part.isascii() else [part])
        ]
    return words


def _is_of_word(character: str) -> bool:
  return unicodedata.category(character)[0] in "LMN"
