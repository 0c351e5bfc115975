"""Hyperparameters: fields that enter a step as data, so that one compiled program serves all their values."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from hamu_jax.config.fields import FIELDS
from hamu_jax.engine import methods

# Names that every step may read; the others belong to the methods that declare them.
_COMMON = ("clip_norm", "max_retain_loss", "min_forget_loss")


def hyperparameters_of(
  options: ml_collections.ConfigDict, method: methods.Method = methods.TRAINING, sam: Any = None
) -> dict[str, float | None]:
  """The values of a stage's options that enter its steps as data.

  Fields that belong to methods are included only if this method declares them, so a method that reads an
  undeclared field fails.

  Args:
    options: `config.train`, `config.method` or `config.memorization`.
    method: row of the method table that the stage runs.
    sam: radius "rho" and weight "lamb" of sharpness-aware gradients, or None for plain gradients.

  Returns:
    Values by name; None switches a feature off. `learning_rate` is the optimizer's peak rate.
  """
  wanted = {*_COMMON, *method.reads}
  values = {
    name: options[name]
    for name in options
    if name in wanted and f"method.{name}" in FIELDS and FIELDS[f"method.{name}"].traced
  }
  values["clip_norm"] = values["clip_norm"] or None
  values["learning_rate"] = options.optimizer.learning_rate
  return values | ({name: float(sam[name]) for name in ("rho", "lamb")} if sam else {})


def traced_fields() -> Mapping[str, bool]:
  """The dotted names of all fields that enter steps as data, and whether 0 switches each off.

  `epochs` are left out, because they also decide how many steps there are. So are the fields of
  `memorization`, whose models are not trained together with those of other experiments.
  """
  return {
    name: field.off_at_zero
    for name, field in FIELDS.items()
    if field.traced and not name.endswith(".epochs") and not name.startswith("memorization.")
  }
