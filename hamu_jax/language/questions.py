"""Questions and answers of a split, as texts on which a model is evaluated.

Shapes: n evaluated questions, W wrong answers to each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hamu_jax.data.encoding import Encoded
from hamu_jax.data.text_reader import TextSplit
from hamu_jax.errors import UserError
from hamu_jax.models.llama_config import LlamaConfig


class Questions(NamedTuple):
  """Some questions of a split.

  Attributes:
    texts: split of N questions.
    answers: each of the N prompts with its answer.
    indices: [n] indices of the questions to evaluate.
    paraphrased: each of the N prompts with a paraphrased answer. None takes the answer itself, as in TOFU's
      real authors and world facts.
    perturbed: W times each of the N prompts with a wrong answer; () if there are none.
  """

  texts: TextSplit
  answers: Encoded
  indices: np.ndarray
  paraphrased: Encoded | None = None
  perturbed: tuple[Encoded, ...] = ()


class Text(NamedTuple):
  """A text whose tokens from `start` on are predicted."""

  ids: np.ndarray
  start: int


def texts_of(encoded: Encoded, indices: np.ndarray | Sequence[int]) -> list[Text]:
  """The encoded texts with some indices."""
  return [Text(encoded.ids[index], int(encoded.answer_start[index])) for index in indices]


def all_texts(questions: Questions) -> dict[Any, list[Text]]:
  """The texts with right answers ("answer"), with paraphrased ones, and with wrong ones (0, 1, ...)."""
  encoded: dict[Any, Encoded] = {"answer": questions.answers}
  if questions.paraphrased is not None:
    encoded["paraphrased"] = questions.paraphrased
  encoded |= dict(enumerate(questions.perturbed))
  return {key: texts_of(part, questions.indices) for key, part in encoded.items()}


def checked_texts(name: str, questions: Questions, config: LlamaConfig) -> dict[Any, list[Text]]:
  """Returns `all_texts`, or raises a UserError that says what is wrong with them."""
  if not len(questions.indices):
    raise UserError(f"evaluation: split {name} has no questions; choose sets that are not empty")
  count = len(questions.answers.ids)
  for encoded in (questions.paraphrased, *questions.perturbed):
    if encoded is not None and len(encoded.ids) != count:
      raise UserError(
        f"evaluation: split {name} has {count} answers and {len(encoded.ids)} other ones; give "
        "one for each question"
      )
  found = all_texts(questions)
  for texts in found.values():
    for row, (ids, start) in zip(questions.indices, texts, strict=True):
      where = f"evaluation: split {name}, row {row}"
      if not 1 <= start < len(ids):
        raise UserError(
          f"{where}: its answer begins at token {start} of {len(ids)}; a text needs a token "
          "before its answer and one in it, so raise the most tokens of a text"
        )
      if len(ids) > config.max_position_embeddings:
        raise UserError(
          f"{where}: {len(ids)} tokens exceed the model's context of "
          f"{config.max_position_embeddings}; lower the most tokens of a text"
        )
      if min(ids) < 0 or max(ids) >= config.vocab_size:
        raise UserError(
          f"{where}: token {max(ids)} is none of the model's {config.vocab_size}; give the "
          "model's own tokenizer"
        )
  return found
