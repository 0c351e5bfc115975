"""Tug-of-war: how close an unlearned model comes to the retrained one."""

from collections.abc import Mapping

from hamu_jax.errors import UserError


def tug_of_war(
  unlearned: Mapping[str, float], retrained: Mapping[str, float], *, signed: bool = False
) -> float:
  r"""Closeness to the retrained reference in retain, forget and test accuracy, as one number.

  .. math::
    \mathrm{ToW} = (1 - |\Delta_r|)(1 - |\Delta_f|)(1 - |\Delta_t|),
    \qquad \Delta_s = a_s^{\text{unlearned}} - a_s^{\text{retrained}}

  It is 1 if all three accuracies are the retrained model's, and 0 if one of them differs by 1. The signed
  form, :math:`(1 + \Delta_r)(1 - \Delta_f)(1 + \Delta_t)`, counts a higher retain or test accuracy and a
  lower forget accuracy than the retrained model's as gains; it can exceed 1.

  Args:
    unlearned: Accuracies ``{"retain", "forget", "test"}`` in [0, 1] of the model to judge.
    retrained: The same accuracies of the model trained without the forget set.
    signed: Whether to take signed differences, as the sharpness paper's code does, instead of absolute ones.

  Returns:
    The product; in [0, 1] unless `signed`.

  Raises:
    UserError: if an accuracy is missing or outside [0, 1].

  Source: RUM (arXiv 2406.01257) defines the absolute form; Sharpness-Aware Unlearning
  (arXiv 2506.13715) computes the signed one.
  """
  product = 1.0
  for split, gain in (("retain", 1), ("forget", -1), ("test", 1)):
    difference = _accuracy("unlearned", unlearned, split) - _accuracy("retrained", retrained, split)
    product *= 1 + gain * difference if signed else 1 - abs(difference)
  return product


def _accuracy(model: str, accuracies: Mapping[str, float], split: str) -> float:
  if split not in accuracies:
    raise UserError(
      f"tug-of-war: the {model} model has no {split} accuracy (it has "
      f"{', '.join(accuracies) or 'none'}); give retain, forget and test"
    )
  value = float(accuracies[split])
  if not 0 <= value <= 1:
    raise UserError(
      f"tug-of-war: {model} {split} accuracy is {value:g}, outside [0, 1]; give fractions, not percent"
    )
  return value
