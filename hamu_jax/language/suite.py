"""TOFU's scores of a language model's answers: the records of each split, and their means."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hamu_jax.language.questions import Questions
from hamu_jax.metrics import tofu

# Model utility is the harmonic mean of three scores of each.
_UTILITY_SPLITS = ("retain", "real_authors", "world_facts")


def texts(questions: Questions, generated: list[str] | None) -> dict[str, Any]:
  """The questions, their answers, and, if there are any, the model's and how alike these are."""
  texts, rows = questions.texts, questions.indices
  record: dict[str, Any] = {
    "row": np.asarray(rows),
    "question": [texts.prompts[row] for row in rows],
    "answer": [texts.answers[row] for row in rows],
  }
  if generated is not None:
    record |= {"generated": generated, **tofu.rouge(generated, record["answer"])}
  return record


def losses(found: Mapping[Any, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays of `metrics.tofu`, of losses by the keys of `questions.all_texts`."""
  wrong = [loss_n for key, loss_n in found.items() if isinstance(key, int)]
  return {
    "avg_gt_loss": found["answer"],
    "avg_paraphrased_loss": found.get("paraphrased", found["answer"]),
    **({"average_perturb_loss": np.stack(wrong, axis=1)} if wrong else {}),
  }


def add_scores(records: Mapping[str, dict[str, Any]], variant: str) -> dict[str, Any]:
  """Scores the answers of every split, and adds each answer's scores to its record.

  Args:
    records: by split, with what `metrics.tofu.split_scores` takes; gets "rouge_score",
      "probability_score" and "truth_ratio_score".
    variant: of the scores, see `metrics.tofu`.

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
