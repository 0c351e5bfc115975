"""Membership inference: how well per-example values tell two sets of examples apart."""

import numpy as np
from numpy.typing import ArrayLike

from hamu_jax.errors import UserError


def loss_auc(negatives: ArrayLike, positives: ArrayLike) -> float:
  r"""Area under the ROC curve of "a higher loss means the second set".

  .. math::
    \mathrm{AUC} = \frac{1}{nm} \sum_{i,j} [n_i < p_j] + \tfrac12 [n_i = p_j]

  0.5: the losses do not separate the sets; 1: every positive lies above every negative. Counted in
  integers over sorted values, hence exact up to the final division, in O((n + m) log n).

  Args:
    negatives: [n] losses of the first set, e.g. forget.
    positives: [m] losses of the second set, e.g. test.

  Returns:
    The AUC in [0, 1]; NaN when a loss is NaN, because a NaN has no rank.

  Raises:
    UserError: one of the sets is empty.

  Source: HAMU's evaluation (retain vs forget and forget vs test losses).
  """
  negatives = np.sort(np.ravel(negatives))
  positives = np.ravel(positives)
  for name, losses in (("first", negatives), ("second", positives)):
    if not losses.size:
      raise UserError(
          f"loss AUC: the {name} set has no examples; evaluate sets that are not empty")
  if np.isnan(negatives).any() or np.isnan(positives).any():
    return float("nan")
  # Below plus below-or-equal counts every win twice and every tie once.
  below = np.searchsorted(negatives, positives, side="left")
  below_or_equal = np.searchsorted(negatives, positives, side="right")
  doubled = int(below.sum(dtype=np.int64)) + int(below_or_equal.sum(dtype=np.int64))
  return doubled / (2 * negatives.size * positives.size)
