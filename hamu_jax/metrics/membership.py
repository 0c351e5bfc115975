"""Membership inference: how well a model's outputs tell members of its training set from non-members.

Axis legend: N examples of a set, C classes, F features that an attack uses, T tokens.
"""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from hamu_jax.errors import UserError

# Song and Mittal's code keeps its logarithms finite with this floor.
_FLOOR = 1e-30
# Floor of the standard deviation of log-probabilities. Smaller values occur only as float32 rounding, for
# distributions that are uniform or certain.
_LEAST_DEVIATION = 1e-3


def loss_auc(negatives: ArrayLike, positives: ArrayLike) -> float:
  r"""Area under the ROC curve of "a higher loss means the second set".

  .. math::
    \mathrm{AUC} = \frac{1}{nm} \sum_{i,j} [n_i < p_j] + \tfrac12 [n_i = p_j]

  The AUC is 0.5 if the losses do not separate the sets, and 1 if every positive is above every negative.
  Pairs are counted in integers over sorted values, so the result is exact up to the final division. The time
  is O((n + m) log n).

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
      raise UserError(f"loss AUC: the {name} set has no examples; evaluate sets that are not empty")
  if np.isnan(negatives).any() or np.isnan(positives).any():
    return float("nan")
  # "Below" plus "below or equal" counts every win twice and every tie once.
  below = np.searchsorted(negatives, positives, side="left")
  below_or_equal = np.searchsorted(negatives, positives, side="right")
  doubled = int(below.sum(dtype=np.int64)) + int(below_or_equal.sum(dtype=np.int64))
  return doubled / (2 * negatives.size * positives.size)


def min_k(log_probs: ArrayLike, mask: ArrayLike | None = None, *, fraction: float = 0.1) -> np.ndarray:
  r"""Min-K%: the mean log-probability of each text's least likely tokens.

  .. math::
    \frac1k \sum_{t \in \text{lowest } k} \log p(x_t \mid x_{<t}), \qquad
    k = \max(1, \lfloor \text{fraction} \cdot n_{\text{tokens}} \rfloor)

  A text seen in training has few tokens that surprise the model, so members score higher.

  Args:
    log_probs: [N, T] log-probabilities of the tokens of each text, in nats; for questions with answers,
      those of the answer's tokens only. Padding may hold any value.
    mask: [N, T], nonzero for tokens, zero for padding; None if there is no padding.
    fraction: Share of the tokens to average, above 0 and at most 1.

  Returns:
    [N]; NaN where a token's log-probability is NaN.

  Raises:
    UserError: if shapes do not fit, a text has no tokens, or the fraction is out of range.

  Source: Shi et al., Detecting Pretraining Data from Large Language Models (arXiv 2310.16789);
  HAMU's evaluation averages a tenth of the answer's tokens.
  """
  log_probs_NxT, mask_NxT = _tokens(log_probs, mask)
  return _mean_of_lowest(log_probs_NxT, mask_NxT, fraction)


def min_k_plus_plus(
  log_probs: ArrayLike,
  means: ArrayLike,
  deviations: ArrayLike,
  mask: ArrayLike | None = None,
  *,
  fraction: float = 0.1,
) -> np.ndarray:
  r"""Min-K%++: `min_k` of log-probabilities standardised by their mean and deviation under the model.

  .. math::
    z_t = \frac{\log p(x_t \mid x_{<t}) - \mu_t}{\sigma_t}, \qquad
    \mu_t = \sum_v p_v \log p_v, \quad \sigma_t^2 = \sum_v p_v (\log p_v - \mu_t)^2,
    \quad p_v = p(v \mid x_{<t})

  :math:`\sigma_t` is at least 1e-3. A position at which the model is certain and right then scores 0,
  which is also the limit.

  Args:
    log_probs: As in `min_k`.
    means: [N, T] :math:`\mu_t`, minus the entropy of the next-token distribution, in nats.
    deviations: [N, T] :math:`\sigma_t`, in nats.
    mask: As in `min_k`.
    fraction: As in `min_k`.

  Returns:
    [N] scores; members score higher. NaN where a token's value is NaN.

  Raises:
    UserError: see `min_k`; also if a deviation is negative.

  Source: Zhang et al., Min-K%++ (arXiv 2404.02936).
  """
  log_probs_NxT, mask_NxT = _tokens(log_probs, mask)
  means_NxT, deviations_NxT = np.asarray(means, np.float64), np.asarray(deviations, np.float64)
  for name, values in (("means", means_NxT), ("deviations", deviations_NxT)):
    if values.shape != log_probs_NxT.shape:
      raise UserError(
        f"Min-K%++: {name} have shape {values.shape} and log-probabilities "
        f"{log_probs_NxT.shape}; give [N, T] for the same tokens"
      )
  if (deviations_NxT[mask_NxT] < 0).any():
    raise UserError(
      f"Min-K%++: deviations go down to {np.nanmin(deviations_NxT[mask_NxT]):g}; give standard "
      "deviations, at least 0"
    )
  # Padding may hold infinities, whose difference would warn.
  differences_NxT = np.subtract(log_probs_NxT, means_NxT, out=np.zeros_like(means_NxT), where=mask_NxT)
  return _mean_of_lowest(differences_NxT / np.maximum(deviations_NxT, _LEAST_DEVIATION), mask_NxT, fraction)


def zlib_ratio(losses: ArrayLike, texts: Sequence[str]) -> np.ndarray:
  r"""The loss of each text relative to its compressed size.

  .. math::
    \ell_i \,/\, |\operatorname{zlib}(x_i)|

  Repetitive texts have low losses whether they were seen or not; compression corrects for that. Members
  score *lower*, as with the loss: ``loss_auc(members, others)``.

  Args:
    losses: [N] mean cross-entropies of the texts, in nats per token.
    texts: The N texts, compressed as UTF-8.

  Returns:
    [N] ratios, in nats per token and byte.

  Raises:
    UserError: if the numbers of losses and texts differ.

  Source: Carlini et al., Extracting Training Data from Large Language Models (arXiv 2012.07805).
  """
  losses_N = np.asarray(losses, np.float64)
  if isinstance(texts, str) or losses_N.shape != (len(texts),):
    raise UserError(
      f"zlib ratio: losses have shape {losses_N.shape} for "
      f"{'one text' if isinstance(texts, str) else f'{len(texts)} texts'}; "
      "give [N] and a list of N texts"
    )
  return losses_N / np.array([len(zlib.compress(text.encode())) for text in texts])


def min_k_auc(
  negatives: ArrayLike,
  positives: ArrayLike,
  *,
  negatives_mask: ArrayLike | None = None,
  positives_mask: ArrayLike | None = None,
  fraction: float = 0.1,
) -> float:
  """Area under the ROC curve of "a higher Min-K% score means the second set".

  The second set is the one that the model is more likely to know: HAMU reports forget against
  retain, and test against forget. The AUC is 0.5 if the scores do not separate the sets. Pass existing
  scores of `min_k` or `min_k_plus_plus` to `loss_auc`, in the same order.

  Args:
    negatives: [n, T] log-probabilities of the tokens of the first set, see `min_k`.
    positives: [m, T'] log-probabilities of the tokens of the second set.
    negatives_mask: [n, T], nonzero for tokens, zero for padding; None if there is no padding.
    positives_mask: [m, T'], the same for the second set.
    fraction: As in `min_k`.

  Returns:
    The AUC in [0, 1]; NaN when a score is NaN.

  Raises:
    UserError: see `min_k`; also if one of the sets is empty.
  """
  return loss_auc(
    min_k(negatives, negatives_mask, fraction=fraction), min_k(positives, positives_mask, fraction=fraction)
  )


def correctness(probs: ArrayLike, labels: ArrayLike) -> np.ndarray:
  """Whether the largest probability is the label's: `probs` [N, C], `labels` [N] -> [N], 0 or 1."""
  return (np.argmax(probs, axis=1) == np.asarray(labels)).astype(np.float64)


def confidence(probs: ArrayLike, labels: ArrayLike) -> np.ndarray:
  """The probability of the label: `probs` [N, C], `labels` [N] -> [N]."""
  return np.take_along_axis(np.asarray(probs), np.asarray(labels)[:, None], axis=1)[:, 0]


def entropy(probs: ArrayLike) -> np.ndarray:
  r"""Shannon entropy :math:`-\sum_k p_k \log p_k` in nats: `probs` [N, C] -> [N]."""
  probs_NxC = np.asarray(probs)
  return -np.sum(probs_NxC * np.log(np.where(probs_NxC > 0, probs_NxC, 1)), axis=1)


def modified_entropy(probs: ArrayLike, labels: ArrayLike, *, reference: bool = False) -> np.ndarray:
  r"""Entropy that depends on the label: small where the model is certain *and* right.

  .. math::
    -(1 - p_y) \log p_y - \sum_{k \ne y} p_k \log(1 - p_k)

  The arguments of the logarithms are at least 1e-30.

  Args:
    probs: [N, C] class probabilities.
    labels: [N] classes in [0, C).
    reference: Whether to compute the formula of the sharpness paper's code, for comparison with its numbers:
      :math:`-\sum_k q_k \log p_k` with :math:`q_k = 1 - p_k` for every class k that is the label
      of *any* example, else :math:`p_k`. It takes the log of p instead of 1 - p, and the value of an
      example depends on the other examples. In a set with every class it ignores the example's own label. A
      forget set of few classes is measured on another scale than the sets on which an attack is trained, so
      that the attack tends to give one answer for all of it.

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
  # 1 - weights would round a small p_y to 0.
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
  """Share of the forget set that support vector machines classify as non-members.

  For each feature below, one machine (RBF kernel, C = 3, gamma = 1/F) learns to tell retain examples, on
  which the model was trained, from test examples. It then classifies the forget examples. At 1, the model
  treats all of them as if it had never seen them. Compare with the retrained model: a value close to its is
  good.

  Args:
    retain_probs: [N_r, C] class probabilities of members.
    retain_labels: [N_r] classes in [0, C).
    test_probs: [N_t, C] class probabilities of non-members.
    test_labels: [N_t] classes of non-members.
    forget_probs: [N_f, C] class probabilities of the examples to classify.
    forget_labels: [N_f] classes of the examples to classify.
    balance_seed: Seed of a permutation whose first N_t retain examples (or all, if they are fewer) are used
      for training. The published attack is balanced, and the time grows with the square of the number of
      examples. None uses all retain examples in the given order.
    reference_entropy: `reference` of `modified_entropy`.

  Returns:
    A value in [0, 1] for each feature: ``correctness``, ``confidence``, ``entropy``,
    ``modified_entropy`` and ``probability`` (all C at once); NaN if a probability is NaN.

  Raises:
    UserError: if a set is empty, shapes do not fit, a label is out of range, or a probability is
      outside [0, 1].

  Source: the attack of SalUn (arXiv 2310.12508) and Sharpness-Aware Unlearning (arXiv 2506.13715).
  """
  sets = checked_sets(
    retain=(retain_probs, retain_labels), test=(test_probs, test_labels), forget=(forget_probs, forget_labels)
  )
  if balance_seed is not None:
    order = np.random.default_rng(balance_seed).permutation(len(sets["retain"][1]))
    members = order[: len(sets["test"][1])]
    probs_NxC, labels_N = sets["retain"]
    sets["retain"] = probs_NxC[members], labels_N[members]
  attacks = _attacks(reference_entropy)
  if any(np.isnan(probs_NxC).any() for probs_NxC, _ in sets.values()):
    return dict.fromkeys(attacks, float("nan"))
  return {
    name: _non_members(
      *(feature(*sets[kind]).reshape(len(sets[kind][1]), -1) for kind in ("retain", "test", "forget"))
    )
    for name, feature in attacks.items()
  }


def _attacks(reference_entropy: bool) -> dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
  """{name: (probabilities, labels) -> the feature that the attack uses}."""
  return {
    "correctness": correctness,
    "confidence": confidence,
    "entropy": lambda probs, labels: entropy(probs),
    "modified_entropy": lambda probs, labels: modified_entropy(probs, labels, reference=reference_entropy),
    "probability": lambda probs, labels: probs,
  }


def checked_sets(**sets: tuple[ArrayLike, ArrayLike]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Checks sets ([N, C] probabilities, [N] labels) of one model; returns float64 and integers."""
  checked = {name: _checked(name, *values) for name, values in sets.items()}
  classes = {name: probs_NxC.shape[1] for name, (probs_NxC, _) in checked.items()}
  if len(set(classes.values())) > 1:
    raise UserError(
      "membership inference: the sets have different numbers of classes "
      f"({', '.join(f'{name} {count}' for name, count in classes.items())}); "
      "give probabilities of one model"
    )
  return checked


def _non_members(members_NxF: np.ndarray, others_NxF: np.ndarray, judged_NxF: np.ndarray) -> float:
  """Share of the judged examples that a machine trained on members and others classifies as others."""
  # Imported here, because the import is slow and no other metric needs it.
  from sklearn.svm import SVC

  machine = SVC(C=3, kernel="rbf", gamma="auto")
  is_member = np.repeat([1, 0], [len(members_NxF), len(others_NxF)])
  machine.fit(np.concatenate([members_NxF, others_NxF]), is_member)
  return float(np.mean(machine.predict(judged_NxF) == 0))


def _tokens(values: ArrayLike, mask: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
  """Checks the values of tokens and their mask, and returns both, the values in float64."""
  values_NxT = np.asarray(values, np.float64)
  mask_NxT = np.ones(values_NxT.shape, bool) if mask is None else np.asarray(mask) != 0
  if values_NxT.ndim != 2 or mask_NxT.shape != values_NxT.shape:
    raise UserError(
      f"Min-K%: log-probabilities have shape {values_NxT.shape} and their mask "
      f"{mask_NxT.shape}; give [N, T] for both"
    )
  is_empty_N = np.asarray(~mask_NxT.any(axis=1))
  if is_empty_N.any():
    raise UserError(
      f"Min-K%: {is_empty_N.sum()} of {len(is_empty_N)} texts have no tokens, the first at row "
      f"{is_empty_N.argmax()}; leave out empty answers"
    )
  return values_NxT, mask_NxT


def _mean_of_lowest(values_NxT: np.ndarray, mask_NxT: np.ndarray, fraction: float) -> np.ndarray:
  """Mean of the lowest `fraction` of each text's values, of at least one value."""
  if not 0 < fraction <= 1:
    raise UserError(f"Min-K%: fraction is {fraction:g}; give a share of the tokens above 0 and at most 1")
  counts_N = np.maximum((fraction * mask_NxT.sum(axis=1)).astype(int), 1)
  # Sorting puts padding after the tokens, and NaN after padding, where it is not averaged.
  lowest_NxT = np.sort(np.where(mask_NxT, values_NxT, np.inf), axis=1)
  is_averaged_NxT = np.arange(lowest_NxT.shape[1]) < counts_N[:, None]
  means_N = np.mean(lowest_NxT, axis=1, where=is_averaged_NxT)
  return np.where((mask_NxT & np.isnan(values_NxT)).any(axis=1), np.nan, means_N)


def _checked(name: str, probs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Checks a set and returns it with probabilities in float64 and integer labels."""
  probs_NxC, labels_N = np.asarray(probs, np.float64), np.asarray(labels)
  where = f"membership inference: {name}"
  if probs_NxC.ndim != 2 or labels_N.shape != probs_NxC.shape[:1]:
    raise UserError(
      f"{where} probabilities have shape {probs_NxC.shape} and labels {labels_N.shape}; give [N, C] and [N]"
    )
  if not labels_N.size:
    raise UserError(f"{where} set has no examples; evaluate sets that are not empty")
  if probs_NxC.min() < 0 or probs_NxC.max() > 1 + 1e-3:
    raise UserError(
      f"{where} probabilities lie in [{probs_NxC.min():g}, {probs_NxC.max():g}], outside [0, 1]; "
      "give the softmax of the logits"
    )
  if labels_N.dtype.kind not in "iu" or labels_N.min() < 0 or labels_N.max() >= probs_NxC.shape[1]:
    raise UserError(
      f"{where} labels are {labels_N.dtype} in [{labels_N.min()}, {labels_N.max()}]; give "
      f"integers from 0 to {probs_NxC.shape[1] - 1}, the classes of the probabilities"
    )
  return probs_NxC, labels_N
