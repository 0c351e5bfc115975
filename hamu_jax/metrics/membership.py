"""Membership inference: how well a model's outputs tell members of its training set from others.

Axis legend: N examples of a set, C classes, F features that an attack looks at.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from hamu_jax.errors import UserError

# Song and Mittal's code keeps its logarithms finite with this floor.
_FLOOR = 1e-30


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


def correctness(probs: ArrayLike, labels: ArrayLike) -> np.ndarray:
  """Whether the largest probability is the label's: [N], 0 or 1, of `probs` [N, C]."""
  return (np.argmax(probs, axis=1) == np.asarray(labels)).astype(np.float64)


def confidence(probs: ArrayLike, labels: ArrayLike) -> np.ndarray:
  """The probability of the label: [N], of `probs` [N, C] and `labels` [N]."""
  return np.take_along_axis(np.asarray(probs), np.asarray(labels)[:, None], axis=1)[:, 0]


def entropy(probs: ArrayLike) -> np.ndarray:
  r"""Shannon entropy :math:`-\sum_k p_k \log p_k` in nats: [N], of `probs` [N, C]."""
  probs_NxC = np.asarray(probs)
  return -np.sum(probs_NxC * np.log(np.where(probs_NxC > 0, probs_NxC, 1)), axis=1)


def modified_entropy(
    probs: ArrayLike, labels: ArrayLike, *, reference: bool = False
) -> np.ndarray:
  r"""Entropy that also knows the label: small where the model is sure *and* right.

  .. math::
    -(1 - p_y) \log p_y - \sum_{k \ne y} p_k \log(1 - p_k)

  Logarithms are taken of at least 1e-30.

  Args:
    probs: [N, C] class probabilities.
    labels: [N] classes in [0, C).
    reference: What the sharpness paper's code computes instead, only to compare with its numbers:
      :math:`-\sum_k q_k \log p_k` with :math:`q_k = 1 - p_k` for every class k that is the label
      of *any* row, else :math:`p_k`. It takes the log of p where 1 - p belongs, and a row's value
      depends on the other rows. In a set with every class it ignores the row's own label, and a
      forget set of few classes is measured on another scale than the sets that an attack learned
      from, so that the attack tends to give one answer for all of it.

  Returns:
    [N], in nats.

  Source: Song and Mittal, Systematic Evaluation of Privacy Risks (arXiv 2003.10595), equation 8.
  """
  probs_NxC, labels_N = np.asarray(probs), np.asarray(labels)
  classes_C = np.arange(probs_NxC.shape[1])
  if reference:
    weights_NxC = np.where(np.isin(classes_C, labels_N), 1 - probs_NxC, probs_NxC)
    return -np.sum(weights_NxC * np.log(np.where(probs_NxC > 0, probs_NxC, _FLOOR)), axis=1)
  own_NxC = classes_C == labels_N[:, None]
  weights_NxC = np.where(own_NxC, 1 - probs_NxC, probs_NxC)
  # Not 1 - weights, which would round a small p_y to 0.
  values_NxC = np.where(own_NxC, probs_NxC, 1 - probs_NxC)
  return -np.sum(weights_NxC * np.log(np.maximum(values_NxC, _FLOOR)), axis=1)


def svc_mia(
    retain_probs: ArrayLike,
    retain_labels: ArrayLike,
    test_probs: ArrayLike,
    test_labels: ArrayLike,
    forget_probs: ArrayLike,
    forget_labels: ArrayLike,
    *,
    balance_seed: int | None = None,
    reference_entropy: bool = False,
) -> dict[str, float]:
  """Share of the forget set that support vector machines take for non-members.

  One machine (RBF kernel, C = 3, gamma = 1/F) for each feature below learns to tell retain rows,
  which the model was trained on, from test rows, and then judges the forget rows. 1: the model
  treats all of them as if it had never seen them. What is right is the retrained model's value.

  Args:
    retain_probs: [N_r, C] class probabilities of members.
    retain_labels: [N_r] classes in [0, C).
    test_probs: [N_t, C] of non-members.
    test_labels: [N_t].
    forget_probs: [N_f, C] of the examples to judge.
    forget_labels: [N_f].
    balance_seed: Learns from as many retain rows as there are test rows (or all, if they are
      fewer): the first of a permutation with this seed. The published attack is balanced, and the
      time grows with the square of the rows. None learns from the retain rows as they are given.
    reference_entropy: `modified_entropy`'s `reference`.

  Returns:
    A value in [0, 1] for each feature: ``correctness``, ``confidence``, ``entropy``,
    ``modified_entropy`` and ``probability`` (all C at once); NaN when a probability is NaN.

  Raises:
    UserError: a set is empty, its shapes do not fit, a label is out of range, or a probability is
      outside [0, 1].

  Source: the attack of SalUn (arXiv 2310.12508) and Sharpness-Aware Unlearning (arXiv 2506.13715).
  """
  sets = {
      "retain": _checked("retain", retain_probs, retain_labels),
      "test": _checked("test", test_probs, test_labels),
      "forget": _checked("forget", forget_probs, forget_labels),
  }
  classes = {name: probs_NxC.shape[1] for name, (probs_NxC, _) in sets.items()}
  if len(set(classes.values())) > 1:
    raise UserError(
        "membership inference: the sets have different numbers of classes "
        f"({', '.join(f'{name} {count}' for name, count in classes.items())}); "
        "give probabilities of one model")
  if balance_seed is not None:
    order = np.random.default_rng(balance_seed).permutation(len(sets["retain"][1]))
    members = order[: len(sets["test"][1])]
    sets["retain"] = tuple(values[members] for values in sets["retain"])
  attacks: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
      "correctness": correctness,
      "confidence": confidence,
      "entropy": lambda probs, labels: entropy(probs),
      "modified_entropy": lambda probs, labels: modified_entropy(
          probs, labels, reference=reference_entropy),
      "probability": lambda probs, labels: probs,
  }
  if any(np.isnan(probs_NxC).any() for probs_NxC, _ in sets.values()):
    return dict.fromkeys(attacks, float("nan"))
  return {
      name: _non_members(*(
          feature(*sets[kind]).reshape(len(sets[kind][1]), -1)
          for kind in ("retain", "test", "forget")
      ))
      for name, feature in attacks.items()
  }


def _non_members(members_NxF: np.ndarray, others_NxF: np.ndarray, judged_NxF: np.ndarray) -> float:
  """Share of the judged rows on the others' side of the machine that separates the first two."""
  # Slow to import, and no other metric needs it.
  from sklearn.svm import SVC

  machine = SVC(C=3, kernel="rbf", gamma="auto")
  is_member = np.repeat([1, 0], [len(members_NxF), len(others_NxF)])
  machine.fit(np.concatenate([members_NxF, others_NxF]), is_member)
  return float(np.mean(machine.predict(judged_NxF) == 0))


def _checked(name: str, probs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """The set in float64 with integer labels, or the UserError that says what is wrong with it."""
  probs_NxC, labels_N = np.asarray(probs, np.float64), np.asarray(labels)
  where = f"membership inference: {name}"
  if probs_NxC.ndim != 2 or labels_N.shape != probs_NxC.shape[:1]:
    raise UserError(
        f"{where} probabilities have shape {probs_NxC.shape} and labels {labels_N.shape}; "
        "give [N, C] and [N]")
  if not labels_N.size:
    raise UserError(f"{where} set has no examples; evaluate sets that are not empty")
  if probs_NxC.min() < 0 or probs_NxC.max() > 1 + 1e-3:
    raise UserError(
        f"{where} probabilities lie in [{probs_NxC.min():g}, {probs_NxC.max():g}], outside [0, 1]; "
        "give the softmax of the logits")
  if labels_N.dtype.kind not in "iu" or labels_N.min() < 0 or labels_N.max() >= probs_NxC.shape[1]:
    raise UserError(
        f"{where} labels are {labels_N.dtype} in [{labels_N.min()}, {labels_N.max()}]; give "
        f"integers from 0 to {probs_NxC.shape[1] - 1}, the classes of the probabilities")
  return probs_NxC, labels_N
