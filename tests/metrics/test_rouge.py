"""ROUGE of any script: what rouge-score computes for its words, and the definition for others."""

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from hamu_jax.errors import UserError
from hamu_jax.metrics import rouge, tofu

_TEXTS = [
  "他写了一本关于山的书",
  "彼女は山についての本を書いた",
  "كتب الرواية عام",
  "Она написала роман",
  "वह पहाड़ों के बारे में लिखती है",
  "เธอเขียนหนังสือเกี่ยวกับภูเขา",
  "그녀는 소설을 썼다",
  "Ela escreveu 3 romances à mão",
]


def _recall(prediction, reference, **options):
  return [float(value[0]) for value in rouge.rouge([prediction], [reference], **options).values()]


@pytest.mark.parametrize("words", rouge.WORDS)
@pytest.mark.parametrize("text", _TEXTS)
def test_a_text_with_itself(text, words):
  assert _recall(text, text, words=words) == [1, 1]


@pytest.mark.parametrize(
  "prediction, reference, recalls",
  [
    # Three of four words, of which two are in order.
    ("роман она вчера написала", "она вчера роман закончила", [3 / 4, 2 / 4]),
    # Characters: 4 of 5, and 3 of these in order.
    ("山的书一", "一本山的书", [4 / 5, 3 / 5]),
    # Latin words among Chinese characters, stemmed.
    ("我有 books", "我的 book 山", [2 / 4, 2 / 4]),
    ("роман", "...", [0, 0]),
    ("", "роман", [0, 0]),
  ],
)
def test_shares_counted_by_hand(prediction, reference, recalls):
  assert _recall(prediction, reference, words="any") == pytest.approx(recalls)


def test_only_references_without_latin_words_are_compared_otherwise():
  """Elsewhere the default is rouge-score's number, accents and all."""
  predictions = ["Zoë wrote novels in 1999", "a café of mountains", "роман Novel"]
  references = ["Zoë is writing a novel, 1999", "the cafés on the mountain", "один Novel"]
  scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
  theirs = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
  found = rouge.rouge(predictions, references)
  for kind in ("rouge1", "rougeL"):
    np.testing.assert_array_equal(found[f"{kind}_recall"], [score[kind].recall for score in theirs])
  assert _recall("роман", "роман два") == [0.5, 0.5]


def test_unknown_words():
  with pytest.raises(UserError, match="ROUGE: words='latex'; choose from latin, any"):
    rouge.rouge(["a"], ["a"], words="latex")
  assert tofu.rouge is rouge.rouge
