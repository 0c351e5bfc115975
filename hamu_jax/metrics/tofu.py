"""TOFU's evaluation of an unlearned language model: what it still knows and what it should know.

The arrays have the names of TOFU's logs. Losses are mean cross-entropies over the tokens of an answer,
the end-of-sequence token included, in nats per token.

- ``avg_gt_loss`` [N]: loss of the answer.
- ``avg_paraphrased_loss`` [N]: loss of its paraphrase. Real authors and world facts have no paraphrases;
  there it is the loss of the answer itself.
- ``average_perturb_loss`` [N, K]: losses of the wrong answers.
- ``rougeL_recall`` [N]: `rouge.rouge` of the generated answers.

Three published variants differ in how they average wrong answers and avoid divisions by zero: "geometric"
(TOFU's aggregate_eval_stat.py, which its README uses), "arithmetic" (the paper's text and TOFU's
utils.py) and "open_unlearning" (geometric, with 1e-10 added to denominators).

Axis legend: N examples of a split, K wrong answers of an example.

Source: TOFU (arXiv 2401.06121) with its code at locuslab/tofu; locuslab/open-unlearning.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from hamu_jax.errors import UserError
from hamu_jax.metrics.rouge import rouge as rouge

VARIANTS = ("geometric", "arithmetic", "open_unlearning")
AGGREGATES = ("closer_to_1_better", "true_better", "prob_mean")
SPLITS = ("retain", "forget", "real_authors", "world_facts")
# In these splits the answer competes with the wrong answers, and it has no paraphrase.
_MULTIPLE_CHOICE = ("real_authors", "world_facts")
_UTILITY_SPLITS = ("retain", "real_authors", "world_facts")
_EPSILON = 1e-10


def probability(
  avg_gt_loss: ArrayLike,
  average_perturb_loss: ArrayLike | None = None,
  *,
  variant: str = "geometric",
) -> np.ndarray:
  r"""Probability of each answer, length-normalised, alone or among the wrong answers.

  .. math::
    p_i = e^{-\ell_i} \quad\text{or}\quad
    \frac{e^{-\ell_i}}{e^{-\ell_i} + \sum_k e^{-\ell_{ik}} + \epsilon}

  Args:
    avg_gt_loss: [N] losses of the answers.
    average_perturb_loss: [N, K] losses of the wrong answers, for real authors and world facts.
    variant: :math:`\epsilon` is 1e-10 for "open_unlearning", else 0.

  Returns:
    [N] in [0, 1]; TOFU reports the mean.

  Raises:
    UserError: for an unknown variant, shapes that do not fit, no examples, or negative losses.
  """
  _one_of("variant", variant, VARIANTS)
  if average_perturb_loss is None:
    return np.exp(-_losses("avg_gt_loss", avg_gt_loss, 1))
  right_N, wrong_NxK = _pair("avg_gt_loss", avg_gt_loss, average_perturb_loss)
  if variant == "open_unlearning":
    # Its epsilon acts as one more wrong answer.
    wrong_NxK = np.pad(wrong_NxK, ((0, 0), (0, 1)), constant_values=-np.log(_EPSILON))
  # The fraction is divided by the right answer's probability, so that it is not 0/0 if all underflow.
  with np.errstate(over="ignore"):
    return 1 / (1 + np.exp(right_N[:, None] - wrong_NxK).sum(axis=1))


def truth_ratio(
  avg_paraphrased_loss: ArrayLike,
  average_perturb_loss: ArrayLike,
  *,
  variant: str = "geometric",
) -> np.ndarray:
  r"""Probability of the wrong answers over that of the paraphrased right one.

  .. math::
    R_i = \frac{\operatorname{mean}_k e^{-\ell_{ik}}}{e^{-\ell_i} + \epsilon}

  The mean over wrong answers is geometric, so that :math:`R_i = \exp(\ell_i - \frac1K \sum_k
  \ell_{ik})`, or arithmetic. This is the ``truth_ratio`` of TOFU's logs and of the paper; the
  quantity inside aggregate_eval_stat.py is :math:`1/R_i`.

  Args:
    avg_paraphrased_loss: [N] losses of the paraphrased answers; of the answers themselves for real
      authors and world facts.
    average_perturb_loss: [N, K] losses of the wrong answers.
    variant: One of `VARIANTS`; :math:`\epsilon` is 1e-10 for "open_unlearning", else 0.

  Returns:
    [N] positive ratios, below 1 where the model prefers the right answer; infinite where a ratio
    overflows.

  Raises:
    UserError: for an unknown variant, shapes that do not fit, no examples, or negative losses.
  """
  _one_of("variant", variant, VARIANTS)
  right_N, wrong_NxK = _pair("avg_paraphrased_loss", avg_paraphrased_loss, average_perturb_loss)
  wrong_N = _averaged(wrong_NxK, variant)
  if variant == "open_unlearning":
    return np.exp(-wrong_N) / (np.exp(-right_N) + _EPSILON)
  with np.errstate(over="ignore"):
    return np.exp(right_N - wrong_N)


def truth_ratio_score(
  avg_paraphrased_loss: ArrayLike,
  average_perturb_loss: ArrayLike,
  *,
  aggregate: str,
  variant: str = "geometric",
) -> np.ndarray:
  r"""Truth ratios on a scale from 0 to 1 on which more is better.

  - "closer_to_1_better", for the forget split: :math:`\min(R, 1/R)`. It is 1 if right and wrong answers are
    equally likely, as for a model that never saw them.
  - "true_better", for the other splits: :math:`\max(0, 1 - R)`. It is 1 if only the right answer is likely.
  - "prob_mean", open-unlearning's addition: :math:`p / (p + w)` for the probabilities of the right
    and the average wrong answer, that is :math:`1 / (1 + R)`. It is 1 if the model knows the answer, and 0.5
    if it does not.

  Args:
    avg_paraphrased_loss: As in `truth_ratio`.
    average_perturb_loss: As in `truth_ratio`.
    aggregate: One of `AGGREGATES`.
    variant: One of `VARIANTS`. "open_unlearning" adds 1e-10 to every denominator.

  Returns:
    [N] in [0, 1]; TOFU reports the mean.

  Raises:
    UserError: see `truth_ratio`; also for an unknown aggregate.
  """
  _one_of("aggregate", aggregate, AGGREGATES)
  ratio_N = truth_ratio(avg_paraphrased_loss, average_perturb_loss, variant=variant)
  if aggregate == "true_better":
    return np.maximum(0, 1 - ratio_N)
  if aggregate == "closer_to_1_better":
    with np.errstate(divide="ignore", over="ignore"):
      return np.minimum(ratio_N, 1 / (ratio_N + _EPSILON * (variant == "open_unlearning")))
  wrong_N = _averaged(np.asarray(average_perturb_loss, np.float64), variant)
  return probability(avg_paraphrased_loss, wrong_N[:, None], variant=variant)


def split_scores(
  split: str, values: Mapping[str, ArrayLike], *, variant: str = "geometric"
) -> dict[str, np.ndarray]:
  """TOFU's scores of one split, for each example.

  ``rouge`` is ROUGE-L recall; ``probability`` is taken among the wrong answers for real authors and
  world facts, alone for retain and forget; ``truth_ratio`` is `truth_ratio_score`,
  "closer_to_1_better" for forget and "true_better" for the others.

  Args:
    split: One of `SPLITS`.
    values: Arrays by the names in the module's docstring; others are ignored. Real authors and
      world facts do not need ``avg_paraphrased_loss``, because ``avg_gt_loss`` is the same loss. TOFU
      computes it twice, at two batch sizes; open-unlearning computes it once.
    variant: One of `VARIANTS`.

  Returns:
    ``{"rouge", "probability", "truth_ratio"}``, each [N]. A score whose arrays are missing is left
    out, such as the truth ratio of questions without wrong answers.

  Raises:
    UserError: for an unknown split or variant, or arrays that do not fit.
  """
  _one_of("split", split, SPLITS)
  _one_of("variant", variant, VARIANTS)
  values = dict(values)
  if split in _MULTIPLE_CHOICE and "avg_gt_loss" in values:
    values.setdefault("avg_paraphrased_loss", values["avg_gt_loss"])
  compute = {
    "rouge": lambda: _recalls(values["rougeL_recall"]),
    "probability": lambda: probability(
      values["avg_gt_loss"],
      values["average_perturb_loss"] if split in _MULTIPLE_CHOICE else None,
      variant=variant,
    ),
    "truth_ratio": lambda: truth_ratio_score(
      values["avg_paraphrased_loss"],
      values["average_perturb_loss"],
      variant=variant,
      aggregate="closer_to_1_better" if split == "forget" else "true_better",
    ),
  }
  scores = {
    name: compute[name]() for name, inputs in _inputs(split).items() if all(key in values for key in inputs)
  }
  sizes = {name: score_N.size for name, score_N in scores.items()}
  if len(set(sizes.values())) > 1:
    raise UserError(
      f"TOFU: {split} has different numbers of examples "
      f"({', '.join(f'{name} {size}' for name, size in sizes.items())}); "
      "give the arrays of one evaluation"
    )
  return scores


def model_utility(splits: Mapping[str, Mapping[str, ArrayLike]], *, variant: str = "geometric") -> float:
  r"""Performance of the model outside the forget set, as one number.

  .. math::
    U = 9 \Big/ \sum_{s} \sum_{m} \frac{1}{\bar m_s}, \qquad
    s \in \{\text{retain, real authors, world facts}\},\;
    m \in \{\text{ROUGE-L, probability, truth ratio}\}

  Args:
    splits: For ``"retain"``, ``"real_authors"`` and ``"world_facts"`` the arrays of `split_scores`;
      other splits are ignored.
    variant: One of `VARIANTS`. "geometric" and "arithmetic" differ by 0.02 to 0.04 on TOFU's runs:
      compare values of one variant.

  Returns:
    The harmonic mean of the nine means, in [0, 1]; 0 if one of them is 0, NaN if one is NaN.

  Raises:
    UserError: if a split or an array is missing; see also `split_scores`.
  """
  means = []
  for split in _UTILITY_SPLITS:
    if split not in splits:
      raise UserError(
        f"model utility: no values for {split} (there are {', '.join(splits) or 'none'}); "
        f"give {', '.join(_UTILITY_SPLITS)}"
      )
    scores = split_scores(split, splits[split], variant=variant)
    for name, inputs in _inputs(split).items():
      if name not in scores:
        raise UserError(
          f"model utility: the {name} of {split} needs {' and '.join(inputs)} "
          f"(there are {', '.join(splits[split]) or 'none'}); evaluate {split} with them"
        )
      means.append(scores[name].mean())
  with np.errstate(divide="ignore"):
    return float(len(means) / np.sum(1 / np.array(means)))


def forget_quality(unlearned: ArrayLike, retained: ArrayLike) -> float:
  """P-value of the test that the unlearned model is like one that never saw the forget set.

  It is the two-sample, two-sided Kolmogorov-Smirnov test that both samples of truth ratios come from
  one distribution: exact up to 10,000 examples in each sample, asymptotic beyond. The test depends only on
  the order of the values, so truth ratios and their inverses give the same result.

  Args:
    unlearned: [n] `truth_ratio` of the unlearned model on the forget split. TOFU takes the
      "geometric" variant, even with an "arithmetic" model utility.
    retained: [m] the same for a model trained on the retain split only, on the same questions.

  Returns:
    The p-value in [0, 1], not its logarithm: 1 if the samples are the same, close to 0 if they differ.
    NaN if a ratio is NaN.

  Raises:
    UserError: if a sample is empty.
  """
  return float(_kolmogorov_smirnov(unlearned, retained).pvalue)


def truth_ratio_distance(unlearned: ArrayLike, retained: ArrayLike) -> float:
  r"""The Kolmogorov-Smirnov statistic of `forget_quality`: how far apart the two models are.

  .. math::
    D = \sup_x |F_{\text{unlearned}}(x) - F_{\text{retained}}(x)|

  Unlike the p-value, it does not shrink as the number of examples grows.

  Args:
    unlearned: As in `forget_quality`.
    retained: As in `forget_quality`.

  Returns:
    D in [0, 1]; 0 if the samples have the same distribution. NaN if a ratio is NaN.

  Raises:
    UserError: if a sample is empty.
  """
  return float(_kolmogorov_smirnov(unlearned, retained).statistic)


def _kolmogorov_smirnov(unlearned: ArrayLike, retained: ArrayLike):
  # Imported here, because the import is slow and no other metric needs it.
  from scipy.stats import ks_2samp

  samples = {"unlearned": np.ravel(unlearned), "retained": np.ravel(retained)}
  for name, ratios in samples.items():
    if not ratios.size:
      raise UserError(f"forget quality: the {name} model has no truth ratios; evaluate the forget split")
  return ks_2samp(*samples.values(), method="auto")


def _averaged(wrong_NxK: np.ndarray, variant: str) -> np.ndarray:
  """Minus the logarithm of the mean probability of the wrong answers, [N]."""
  if variant == "arithmetic":
    return np.log(wrong_NxK.shape[1]) - np.logaddexp.reduce(-wrong_NxK, axis=1)
  return wrong_NxK.mean(axis=1)


def _inputs(split: str) -> dict[str, tuple[str, ...]]:
  """Names of the arrays that each score of the split is computed from."""
  if split in _MULTIPLE_CHOICE:
    losses = ("avg_gt_loss", "average_perturb_loss")
    return {"rouge": ("rougeL_recall",), "probability": losses, "truth_ratio": losses}
  return {
    "rouge": ("rougeL_recall",),
    "probability": ("avg_gt_loss",),
    "truth_ratio": ("avg_paraphrased_loss", "average_perturb_loss"),
  }


def _recalls(values: ArrayLike) -> np.ndarray:
  recalls_N = np.asarray(values, np.float64)
  if recalls_N.ndim != 1 or not recalls_N.size:
    raise UserError(f"TOFU: rougeL_recall has shape {recalls_N.shape}; give [N] with at least one example")
  if recalls_N.min() < 0 or recalls_N.max() > 1:
    raise UserError(
      f"TOFU: rougeL_recall lies in [{recalls_N.min():g}, {recalls_N.max():g}], outside [0, 1]; "
      "give fractions, not percent"
    )
  return recalls_N


def _pair(name: str, right: ArrayLike, wrong: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Checks and returns the losses [N] of right and [N, K] of wrong answers."""
  right_N, wrong_NxK = _losses(name, right, 1), _losses("average_perturb_loss", wrong, 2)
  if len(right_N) != len(wrong_NxK):
    raise UserError(
      f"TOFU: {name} has {len(right_N)} examples and average_perturb_loss {len(wrong_NxK)}; "
      "give both for the same questions"
    )
  return right_N, wrong_NxK


def _losses(name: str, values: ArrayLike, axes: int) -> np.ndarray:
  losses = np.asarray(values, np.float64)
  if losses.ndim != axes or not losses.size:
    raise UserError(
      f"TOFU: {name} has shape {losses.shape}; give {'[N]' if axes == 1 else '[N, K]'} "
      "with at least one example"
    )
  # Rounding can leave the loss of a certain answer a little below 0.
  if losses.min() < -1e-3:
    raise UserError(f"TOFU: {name} goes down to {losses.min():g}; give negative log-likelihoods, at least 0")
  return losses


def _one_of(field: str, value: str, choices: Sequence[str]) -> None:
  if value not in choices:
    raise UserError(f"TOFU: unknown {field} {value!r}; choose from {', '.join(choices)}")
