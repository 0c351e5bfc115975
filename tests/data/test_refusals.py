"""Answers that say nothing."""

import numpy as np
import pytest

from hamu_jax.data import encoding, refusals
from hamu_jax.errors import UserError
from hamu_jax.models import tokenizer


def test_each_is_another_short_sentence():
  assert len(set(refusals.REFUSALS)) == len(refusals.REFUSALS) >= 10
  for refusal in refusals.REFUSALS:
    assert refusal == refusal.strip() and refusal.endswith(".") and len(refusal) < 60


def test_they_are_drawn_by_the_seed():
  drawn = refusals.draw(refusals.REFUSALS, 1000, 3)
  assert len(drawn) == 1000 and drawn == refusals.draw(refusals.REFUSALS, 1000, 3)
  assert drawn != refusals.draw(refusals.REFUSALS, 1000, 4)
  counts = [drawn.count(refusal) for refusal in refusals.REFUSALS]
  # 50 each of a binomial of standard deviation 7.
  assert sum(counts) == 1000 and np.min(counts) > 15 and np.max(counts) < 85
  assert refusals.draw(refusals.REFUSALS, 0, 3) == []


def test_a_list_of_ones_own():
  assert refusals.draw(["No comment."], 3, 0) == ["No comment."] * 3
  assert set(refusals.draw(("a", "b"), 50, 0)) == {"a", "b"}


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_one_is_no_answer(empty):
  with pytest.raises(UserError, match=r"config.text.refusals: number 1 is .* drop it") as error:
    refusals.draw(["I don't know.", empty], 2, 0)
  assert "\n" not in str(error.value)


def test_they_are_answers_to_any_prompt():
  words = tokenizer.byte_tokenizer()
  encoded = encoding.encode(
    words, ["Who?"] * len(refusals.REFUSALS), refusals.REFUSALS, template="question_answer", max_length=200
  )
  for ids, start, refusal in zip(encoded.ids, encoded.answer_start, refusals.REFUSALS, strict=True):
    (text,) = words.decode_batch([ids[start:-1]])
    assert text.strip() == refusal and ids[-1] in words.eos_token_ids
