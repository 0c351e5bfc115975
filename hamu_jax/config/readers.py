"""Readers of fields: conditions on a configuration, with words that say when they hold."""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

from hamu_jax.config import modalities
from hamu_jax.engine import methods, objectives

# The value of `data.scores` that asks for an ensemble to estimate them.
ESTIMATE = "estimate"


class Reader(NamedTuple):
  """A condition under which something reads a field.

  Attributes:
    holds: (config) -> whether something reads the field.
    says: () -> words that complete "it is read ...".
  """

  holds: Callable[[ml_collections.ConfigDict], bool]
  says: Callable[[], str]

  def __and__(self, other: "Reader") -> "Reader":
    """A field that is read where both conditions hold."""
    return Reader(
      lambda config: self.holds(config) and other.holds(config), lambda: f"{self.says()} and {other.says()}"
    )

  def __or__(self, other: "Reader") -> "Reader":
    """A field that is read where either condition holds."""
    return Reader(
      lambda config: self.holds(config) or other.holds(config), lambda: f"{self.says()}, or {other.says()}"
    )


def value_of(config: ml_collections.ConfigDict, name: str) -> Any:
  """The value of a field by its dotted name without "config"."""
  for part in name.split("."):
    config = config[part]
  return config


def method_of(config: ml_collections.ConfigDict) -> methods.Method:
  """The row of the method table that a configuration names."""
  return methods.METHODS[config.method.name]


def retrains(config: ml_collections.ConfigDict) -> bool:
  """Whether a model is trained without the forget set, and not read from elsewhere."""
  return method_of(config).from_scratch or (config.retrain and not config.retrained)


def given_reference(config: ml_collections.ConfigDict) -> str:
  """Where the retrained model is read from; empty if none is read."""
  return config.retrained if config.retrain and not method_of(config).from_scratch else ""


ALWAYS = Reader(lambda config: True, lambda: "always")
NEVER = Reader(lambda config: False, lambda: "by nothing")


def is_one_of(name: str, *values: Any) -> Reader:
  """A field that is read where another field has one of these values."""
  shown = " or ".join(repr(value) for value in values)
  return Reader(lambda config: value_of(config, name) in values, lambda: f"if config.{name} is {shown}")


def is_none_of(name: str, *values: Any) -> Reader:
  """A field that is read where another field has none of these values."""
  shown = ", ".join(repr(value) for value in values)
  return Reader(
    lambda config: value_of(config, name) not in values, lambda: f"if config.{name} is none of {shown}"
  )


def is_on(name: str) -> Reader:
  """A field that is read where another field is set: not None, 0, False or empty."""
  return Reader(lambda config: bool(value_of(config, name)), lambda: f"if config.{name} is set")


def is_off(name: str) -> Reader:
  """A field that is read where another field is not set: None, 0, False or empty."""
  return Reader(lambda config: not value_of(config, name), lambda: f"if config.{name} is not set")


def is_unset(name: str) -> Reader:
  """A field that is read where another field is None."""
  return Reader(lambda config: value_of(config, name) is None, lambda: f"if config.{name} is not set")


def by_methods(name: str) -> Reader:
  """A field that is read where the method declares `method.NAME`."""

  def says():
    readers = [method for method, row in methods.METHODS.items() if name in row.reads]
    return f"by the methods {', '.join(readers)}"

  return Reader(lambda config: name in method_of(config).reads, says)


def of_modality(name: str, words: str) -> Reader:
  """A field that experiments of one modality read."""
  return Reader(lambda config: modalities.name_of(config) == name, lambda: words)


IMAGES = of_modality(modalities.IMAGES, "by experiments on images")
TEXTS = of_modality(modalities.TEXTS, "by experiments on language models")
UNLEARNS = Reader(
  lambda config: method_of(config).unlearns,
  lambda: "by all methods but those that only train (none, retrain)",
)
# A method that trains from scratch retrains in any case.
MAY_RETRAIN = Reader(
  lambda config: not method_of(config).from_scratch, lambda: "by all methods but those that retrain"
)
TRAINS = Reader(
  lambda config: not config.model.weights or retrains(config),
  lambda: "if a model is pretrained or retrained",
)
ENSEMBLE = Reader(
  lambda config: (
    modalities.name_of(config) == modalities.IMAGES
    and config.data.forget == "memorization"
    and config.data.scores == ESTIMATE
  ),
  lambda: f"if config.data.forget is 'memorization' and config.data.scores is {ESTIMATE!r}",
)
MASKED = is_on("mask.fraction") | is_on("mask.path")
PERTURBED = Reader(
  lambda config: bool(
    (config.sam.rho and UNLEARNS.holds(config)) or (config.sam.train_rho and TRAINS.holds(config))
  ),
  lambda: "if config.sam.rho or config.sam.train_rho is set",
)
# A sub-step of one role has one gradient, so both scopes evaluate it at the same point.
PAIRS = Reader(
  lambda config: any(len(substep.roles) > 1 for substep in method_of(config).substeps),
  lambda: "by methods that take a step on both roles at once",
)
ALTERNATIVES = Reader(
  lambda config: any(objectives.TERMS[name].needs_alternative for name in method_of(config).used_terms),
  lambda: "by methods that read alternative answers (dpo, idk and their _kl forms)",
)
SHARED_MODE = Reader(
  lambda config: any(substep.mode is None for substep in method_of(config).substeps),
  lambda: "by methods without modes of their own",
)
RETAINS = Reader(lambda config: "retain" in method_of(config).roles, lambda: "by methods that retain")
FORGETS = Reader(lambda config: "forget" in method_of(config).roles, lambda: "by methods that forget")
