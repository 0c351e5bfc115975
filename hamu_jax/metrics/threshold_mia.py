"""Membership inference by a threshold for each class, beside the support vector machines of `svc_mia`."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from hamu_jax.metrics import membership

# Scores that are higher for members, by name.
_SCORES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
  "confidence": membership.confidence,
  "entropy": lambda probs, labels: -membership.entropy(probs),
  "modified_entropy": lambda probs, labels: -membership.modified_entropy(probs, labels),
}


def threshold_mia(
  retain_probs: ArrayLike,
  retain_labels: ArrayLike,
  test_probs: ArrayLike,
  test_labels: ArrayLike,
  forget_probs: ArrayLike,
  forget_labels: ArrayLike,
) -> dict[str, float]:
  r"""Share of the forget set that thresholds classify as non-members.

  For each score and class, the threshold is the value of a retain or test example of that class that
  separates them best: it maximises :math:`P(s_\text{retain} \ge t) + P(s_\text{test} < t)`, and is the first
  of several. A forget example is called a non-member if its score is below its class's threshold. For
  ``correctness`` there is no threshold: wrongly classified examples are called non-members. Where retain or
  test examples of a class are missing, nothing separates them, and its forget examples are called members.

  Args:
    retain_probs: [N_r, C] class probabilities of members.
    retain_labels: [N_r] classes in [0, C).
    test_probs: [N_t, C] class probabilities of non-members.
    test_labels: [N_t] classes of non-members.
    forget_probs: [N_f, C] class probabilities of the examples to classify.
    forget_labels: [N_f] classes of the examples to classify.

  Returns:
    A value in [0, 1] for ``correctness``, ``confidence``, ``entropy`` and ``modified_entropy``; NaN if a
    probability is NaN.

  Raises:
    UserError: see `membership.svc_mia`.

  Source: Song and Mittal, Systematic Evaluation of Privacy Risks (arXiv 2003.10595), as in the code of
  Sharpness-Aware Unlearning (arXiv 2506.13715), whose modified entropy differs; see
  `membership.modified_entropy`.
  """
  sets = membership.checked_sets(
    retain=(retain_probs, retain_labels), test=(test_probs, test_labels), forget=(forget_probs, forget_labels)
  )
  names = ("correctness", *_SCORES)
  if any(np.isnan(probs_NxC).any() for probs_NxC, _ in sets.values()):
    return dict.fromkeys(names, float("nan"))
  forget_probs, forget_labels = sets["forget"]
  result = {"correctness": 1 - float(np.mean(membership.correctness(forget_probs, forget_labels)))}
  for name, score in _SCORES.items():
    scores = {kind: score(*values) for kind, values in sets.items()}
    labels = {kind: labels_N for kind, (_, labels_N) in sets.items()}
    threshold_C = np.array(
      [
        _threshold(*(scores[kind][labels[kind] == label] for kind in ("retain", "test")))
        for label in range(forget_probs.shape[1])
      ]
    )
    result[name] = float(np.mean(scores["forget"] < threshold_C[forget_labels]))
  return result


def _threshold(members: np.ndarray, others: np.ndarray) -> float:
  """The value that separates members, at or above it, from others best."""
  if not members.size or not others.size:
    return -np.inf
  candidates = np.concatenate([members, others])
  above = 1 - np.searchsorted(np.sort(members), candidates, side="left") / members.size
  below = np.searchsorted(np.sort(others), candidates, side="left") / others.size
  return float(candidates[np.argmax(above + below)])
