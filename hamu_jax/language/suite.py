"""TOFU's scores of a language model's answers: the records of each split, and the means of scores."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hamu_jax.language.questions import Questions
from hamu_jax.metrics import tofu

# Model utility is the harmonic mean of three scores of each of these splits.
_UTILITY_SPLITS = ("retain", "real_authors", "world_facts")


def texts(questions: Questions, generated: list[str] | None, rouge_words: str = "latin") -> dict[str, Any]:
  """The record of the questions, their answers and, if there are any, generated answers with ROUGE."""
  texts, indices = questions.texts, questions.indices
  record: dict[str, Any] = {
    "row": np.asarray(indices),
    "question": [texts.prompts[index] for index in indices],
    "answer": [texts.answers[index] for index in indices],
  }
  if generated is not None:
    record |= {"generated": generated, **tofu.rouge(generated, record["answer"], words=rouge_words)}
  return record


def losses(found: Mapping[Any, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays of losses that `metrics.tofu` takes, from losses by the keys of `questions.all_texts`."""
  wrong = [loss_n for key, loss_n in found.items() if isinstance(key, int)]
  return {
    "avg_gt_loss": found["answer"],
    "avg_paraphrased_loss": found.get("paraphrased", found["answer"]),
    **({"average_perturb_loss": np.stack(wrong, axis=1)} if wrong else {}),
  }


def add_scores(records: Mapping[str, dict[str, Any]], variant: str) -> dict[str, Any]:
  """Scores the answers of every split, and adds each answer's scores to its record.

  Args:
    records: records by split, with the inputs of `metrics.tofu.split_scores`; "rouge_score",
      "probability_score" and "truth_ratio_score" are added.
    variant: variant of the scores, see `metrics.tofu`.

  Returns:
    The values of `Evaluator.suite`.
  """
  scores = {
    name: tofu.split_scores(name if name in tofu.SPLITS else "retain", record, variant=variant)
    for name, record in records.items()
  }
  values: dict[str, Any] = {
    name: {key: float(np.mean(score)) for key, score in split.items()} for name, split in scores.items()
  }
  if all(len(scores.get(name, ())) == 3 for name in _UTILITY_SPLITS):
    values["model_utility"] = tofu.model_utility(records, variant=variant)
  for name, record in records.items():
    record.update({f"{key}_score": score for key, score in scores[name].items()})
  return values
