"""The table of methods: what each role differentiates and how two gradients become one update.

A new method is a row here, a test and a config; its diff never edits the loop.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from hamu_jax import transforms
from hamu_jax.paired import Paired

Coefficient = float | str
Settings = Mapping[str, Any]


class SubStep(NamedTuple):
  """One update of the parameters.

  Attributes:
    retain: {term: coefficient} of the retain objective, or None if the role is not used. A coefficient
      is a number, or the name of a setting.
    forget: the same for the forget objective. An ascended loss has a negative coefficient, except for
      transforms that know the roles (hamu, gru, pcgrad), which take the gradients of the plain losses.
    transform: (options, learning rate schedule, settings) -> the optax transformation that turns the
      role gradients into one equivalent gradient.
  """

  retain: Mapping[str, Coefficient] | None
  forget: Mapping[str, Coefficient] | None
  transform: Callable[..., optax.GradientTransformationExtraArgs]

  @property
  def terms(self) -> Paired:
    """The names of each role's terms, sorted, or None for a role that is not used."""
    return Paired(*(None if role is None else tuple(sorted(role)) for role in (self.retain, self.forget)))

  def coefficients(self, settings: Settings) -> Paired:
    """{term: scalar array} of each role, named ones looked up in `settings`; None as in `terms`."""

    def values(role):
      return role and {
          name: jnp.asarray(settings[value] if isinstance(value, str) else value)
          for name, value in role.items()
      }

    return Paired(values(self.retain), values(self.forget))


class Method(NamedTuple):
  """A row of the table: the sub-steps that make one step, in order."""

  substeps: tuple[SubStep, ...]

  @property
  def roles(self) -> tuple[str, ...]:
    """The roles whose batches the method reads."""
    return tuple(
        role
        for role in ("retain", "forget")
        if any(getattr(substep, role) is not None for substep in self.substeps)
    )


def _plain(options, learning_rate, settings):
  del options, learning_rate, settings
  return transforms.plain()


def _average(options, learning_rate, settings):
  del options, learning_rate, settings
  return transforms.average()


def _gru(options, learning_rate, settings):
  del learning_rate
  return transforms.gru(max_norm=settings["max_norm"], reference_sign=options.reference_sign)


def _pcgrad(options, learning_rate, settings):
  del learning_rate
  return transforms.pcgrad(max_norm=settings["max_norm"], reference_sign=options.reference_sign)


def _hamu(variant):
  def build(options, learning_rate, settings):
    constraint = settings["constraint"]
    if constraint is None:
      # A ratio means ratio times the current rate.
      def constraint(count):
        return settings["constraint_ratio"] * learning_rate(count)

    return transforms.hamu(
        learning_rate,
        constraint,
        variant=variant,
        radius=settings["radius"],
        share=options.share,
        scope=options.scope,
        normalize_share=options.normalize_share,
        on_infeasible=options.on_infeasible,
        stop_on_criterion=options.stop_on_criterion,
        criterion=options.criterion,
    )

  return build


def _paired(retain, forget, transform) -> Method:
  return Method((SubStep(retain, forget, transform),))


METHODS: dict[str, Method] = {
    "ft": _paired({"ce": 1.0}, None, _plain),
    "ga": _paired(None, {"ce": -1.0}, _plain),
    "gdiff": _paired({"ce": 1.0}, {"ce": -1.0}, _average),
    "kl": _paired({"kl": 1.0}, {"ce": -1.0}, _average),
    "scrub": _paired({"ce": "gamma", "kl": "alpha"}, {"kl": -1.0}, _average),
    "gru": _paired({"ce": 1.0}, {"ce": 1.0}, _gru),
    "pcgrad": _paired({"ce": 1.0}, {"ce": 1.0}, _pcgrad),
    "hamu-q": _paired({"ce": 1.0}, {"ce": 1.0}, _hamu("hamu-q")),
    "hamu-u": _paired({"ce": 1.0}, {"ce": 1.0}, _hamu("hamu-u")),
}

# Training from scratch is the same step with one role: whatever rows the stage retains.
TRAINING = METHODS["ft"]


def needs_reference(method: Method, terms: Mapping[str, Any]) -> bool:
  """Whether any sub-step reads the frozen original model."""
  return any(
      terms[name].needs_reference
      for substep in method.substeps
      for role in (substep.retain, substep.forget)
      if role is not None
      for name in role
  )

