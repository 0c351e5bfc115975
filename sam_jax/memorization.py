"""Memorization scores of training examples: their estimation, and the forget sets that they choose."""

import numpy as np

LEVELS = ("high", "mid", "low", "mixed")


def select(scores: np.ndarray, size: int, level: str) -> np.ndarray:
  """Chooses examples by how strongly they are memorized.

  The examples are sorted by descending score; ties are in the order of their indices. `high` is the first
  `size` of them and `low` the last, both in that order. `mid` is the `size` examples nearest to a score of
  0.5, nearest first; ties are in the order of the sort. `mixed` joins a third of each, in the order high,
  mid, low: the first and the last of the sort and, among the others, those nearest to 0.5. If three does
  not divide the size, low gets the first remaining example and high the second.

  Args:
    scores: [N] memorization score of each example.
    size: n, number of examples to choose, 1..N.
    level: one of `LEVELS`.

  Returns:
    [n] int64 distinct indices of examples.

  Raises:
    ValueError: for an unknown level, a size out of range, or scores that are not finite.

  Source: the forget sets of RUM (arXiv 2406.01257) and Sharpness-Aware Unlearning (arXiv
  2506.13715), in whose code the thirds of a mixed set can overlap and an example can be missing.
  """
  scores_N = np.asarray(scores, np.float64)
  if level not in LEVELS:
    raise ValueError(f"memorization level {level!r}: choose from {', '.join(LEVELS)}")
  if scores_N.ndim != 1 or not np.isfinite(scores_N).all():
    raise ValueError(
      f"memorization scores: need one finite number per example, but have shape {scores_N.shape} with"
      f" {np.sum(~np.isfinite(scores_N))} values that are not finite"
    )
  if not 1 <= size <= len(scores_N):
    raise ValueError(f"{size} examples of {len(scores_N)} by memorization: choose 1..{len(scores_N)}")
  descending = np.argsort(-scores_N, kind="stable")
  if level == "high":
    return descending[:size]
  if level == "low":
    return descending[-size:]
  by_middle = descending[np.argsort(np.abs(scores_N[descending] - 0.5), kind="stable")]
  if level == "mid":
    return by_middle[:size]
  third, over = divmod(size, 3)
  high = descending[: third + (over == 2)]
  low = descending[len(descending) - third - (over > 0) :]
  mid = by_middle[~np.isin(by_middle, np.concatenate([high, low]))][:third]
  return np.concatenate([high, mid, low])


def subsample(num_examples: int, num_models: int, fraction: float, seed: int) -> np.ndarray:
  """Draws the examples that each model of an ensemble is trained on.

  The subset of model k depends on the seed and on k alone, so an ensemble can be extended.

  Args:
    num_examples: N, number of examples.
    num_models: K, number of models.
    fraction: share of the examples in each subset, in (0, 1); 0.7 in the paper.
    seed: seed of the draws.

  Returns:
    [K, N] bool, True where model k is trained on example i; exactly round(fraction N) per model.

  Raises:
    ValueError: for a fraction whose subsets are empty or hold every example.

  Source: Feldman and Zhang, What Neural Networks Memorize and Why (arXiv 2008.03703), section 2.2.
  """
  size = round(fraction * num_examples) if 0 < fraction < 1 else 0
  if not 0 < size < num_examples:
    raise ValueError(
      f"subsets of {fraction} of {num_examples} examples: choose a fraction in (0, 1) that takes at least"
      " one example and leaves one"
    )
  included_KxN = np.zeros((num_models, num_examples), bool)
  for model, included_N in enumerate(included_KxN):
    included_N[np.random.default_rng((seed, model)).permutation(num_examples)[:size]] = True
  return included_KxN


def memorization_scores(correct: np.ndarray, included: np.ndarray) -> np.ndarray:
  r"""Estimates how much more often an example's label is predicted if the example was trained on.

  .. math::
    \mathrm{mem}_i = P_k(\text{model } k \text{ right on } i \mid i \in S_k)
      - P_k(\text{model } k \text{ right on } i \mid i \notin S_k)

  The probabilities are estimated by relative frequencies over K models.

  Args:
    correct: [K, N] whether model k predicts the label of example i; bool, or a probability in [0, 1].
    included: [K, N] bool, whether example i was in model k's training subset.

  Returns:
    [N] float64 in [-1, 1].

  Raises:
    ValueError: if the shapes differ, or some example was in every subset or in none, which leaves one
      of its two frequencies undefined.

  Source: Feldman and Zhang, What Neural Networks Memorize and Why (arXiv 2008.03703), equation 1
  and section 2.2, the subsampled estimator.
  """
  correct_KxN, included_KxN = np.asarray(correct), np.asarray(included, bool)
  if correct_KxN.shape != included_KxN.shape or included_KxN.ndim != 2:
    raise ValueError(
      f"memorization scores: give two arrays of [models, examples], not of {correct_KxN.shape} and"
      f" {included_KxN.shape}"
    )
  ins_N = included_KxN.sum(0)
  outs_N = len(included_KxN) - ins_N
  never_in, never_out = np.sum(ins_N == 0), np.sum(outs_N == 0)
  if never_in or never_out:
    raise ValueError(
      f"{never_in} of {len(ins_N)} examples are in no training subset and {never_out} in all of"
      f" them, so their memorization is undefined: train more than {len(included_KxN)} models,"
      " or on a fraction nearer to 0.5"
    )
  right_in_N = np.sum(correct_KxN, 0, np.float64, where=included_KxN)
  right_out_N = np.sum(correct_KxN, 0, np.float64, where=~included_KxN)
  return right_in_N / ins_N - right_out_N / outs_N
