"""Memorization scores of training examples: their estimate, and the forget sets chosen by them."""

import numpy as np

LEVELS = ("high", "mid", "low", "mixed")


def select(scores: np.ndarray, size: int, level: str) -> np.ndarray:
  """Chooses examples by how strongly they are memorized.

  The examples are sorted by descending score, ties in example order. `high` is the first `size` of them and
  `low` the last, both in that order; `mid` is the `size` nearest to a score of 0.5, nearest first,
  ties in the order of the sort. `mixed` joins a third of each, in the order high, mid, low: the
  first and the last of the sort and, of the examples that are left, those nearest to 0.5. Of a size
  that three does not divide, low gets the first example over and high the second.

  Args:
    scores: [N] memorization score of each example.
    size: n, how many examples to choose, 1..N.
    level: one of `LEVELS`.

  Returns:
    [n] int64, distinct example numbers.

  Raises:
    ValueError: for an unknown level, a size out of range, or scores that are not finite.

  Source: the forget sets of RUM (arXiv 2406.01257) and Sharpness-Aware Unlearning (arXiv
  2506.13715), whose code deals mixed thirds that can overlap and lack an example.
  """
  scores_N = np.asarray(scores, np.float64)
  if level not in LEVELS:
    raise ValueError(f"memorization level {level!r}: choose from {', '.join(LEVELS)}")
  if scores_N.ndim != 1 or not np.isfinite(scores_N).all():
    raise ValueError(
      f"memorization scores: needs one finite number an example, but has shape {scores_N.shape} with"
      f" {np.sum(~np.isfinite(scores_N))} values that are none"
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
    num_examples: N.
    num_models: K.
    fraction: share of the examples in each subset, in (0, 1); 0.7 in the paper.
    seed: of the draws.

  Returns:
    [K, N] bool, True where model k is trained on example i; exactly round(fraction N) a model.

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
  r"""Estimates how much an example's own label is only known because the example was trained on.

  .. math::
    \mathrm{mem}_i = P_k(\text{model } k \text{ right on } i \mid i \in S_k)
      - P_k(\text{model } k \text{ right on } i \mid i \notin S_k)

  with relative frequencies over K models for the probabilities.

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
      f"memorization scores need two arrays of [models, examples], not of {correct_KxN.shape} and"
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
