"""The table of methods: what each role differentiates, and how two gradients become one update.

To add a method, add a row here, a test and a configuration file. The loop does not change.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from hamu_jax import transforms
from hamu_jax.engine import objectives
from hamu_jax.paired import Paired

Hyperparameters = Mapping[str, Any]


class Schedule(NamedTuple):
  """A coefficient that is computed from hyperparameters and the epoch.

  Attributes:
    value: (hyperparameters, epoch) -> scalar.
    reads: names of the hyperparameters that it reads.
  """

  value: Callable[[Hyperparameters, Any], Any]
  reads: tuple[str, ...]


# A number, the name of a hyperparameter, or a schedule.
Coefficient = float | str | Schedule


class Transform(NamedTuple):
  """The transformation of a sub-step's role gradients into one equivalent gradient.

  Attributes:
    build: (options {name: value}, learning rate schedule, hyperparameters) -> the optax transformation.
    reads: names of the fields of `config.method` that it reads, from options or hyperparameters.
  """

  build: Callable[..., optax.GradientTransformationExtraArgs]
  reads: tuple[str, ...] = ()


class SubStep(NamedTuple):
  """One update of the parameters.

  Attributes:
    retain: coefficients of the retain objective by term, or None if the role is not used. A loss to ascend
      has a negative coefficient. Transforms that know the roles (hamu, gru, pcgrad) take the gradients of the
      plain losses instead.
    forget: coefficients of the forget objective by term, or None.
    transform: transformation of the role gradients into one equivalent gradient.
    one_loss: whether the update descends the sum of both objectives, so that one perturbation can serve
      both roles.
    moves: which weights move if there is a mask: the "salient" ones or the "rest".
    optimizer: name of the base optimizer's state; sub-steps with the same name share it.
    mode: name of the field of `config.method` that holds the mode of its sharpness-aware gradients; None
      takes `config.sam.mode`.
    epochs: in the layout "passes", name of the field of `config.method` that holds the number of first epochs
      in which it is active; None for all epochs.
  """

  retain: Mapping[str, Coefficient] | None
  forget: Mapping[str, Coefficient] | None
  transform: Transform
  one_loss: bool = True
  moves: str = "salient"
  optimizer: str = "shared"
  mode: str | None = None
  epochs: str | None = None

  @property
  def terms(self) -> Paired:
    """The names of each role's terms, sorted, or None for a role that is not used."""
    return Paired(*(None if role is None else tuple(sorted(role)) for role in (self.retain, self.forget)))

  @property
  def roles(self) -> tuple[str, ...]:
    """The roles whose batches it reads."""
    return tuple(role for role in ("retain", "forget") if getattr(self, role) is not None)

  @property
  def reads(self) -> frozenset[str]:
    """Names of the fields of `config.method` that it reads."""
    names = {*self.transform.reads, *(name for name in (self.mode, self.epochs) if name)}
    for role in (self.retain, self.forget):
      for term, coefficient in (role or {}).items():
        names.update(objectives.TERMS[term].reads)
        if isinstance(coefficient, Schedule):
          names.update(coefficient.reads)
        elif isinstance(coefficient, str):
          names.add(coefficient)
    return frozenset(names)

  def coefficients(self, hyperparameters: Hyperparameters, epoch) -> Paired:
    """Coefficients {term: scalar array} of each role in an epoch, None for a role that is not used."""

    def value(coefficient):
      if isinstance(coefficient, Schedule):
        coefficient = coefficient.value(hyperparameters, epoch)
      return jnp.asarray(hyperparameters[coefficient] if isinstance(coefficient, str) else coefficient)

    def values(role):
      return role and {name: value(coefficient) for name, coefficient in role.items()}

    return Paired(values(self.retain), values(self.forget))


class Method(NamedTuple):
  """A row of the table.

  Attributes:
    substeps: parts of one step, in order; none if the method trains without unlearning.
    layout: order of batches. "paired": each step reads one batch of every role. "merged": each step reads a
      batch of both sets as the retain role. "passes": an epoch reads the sets one after the other, in the
      order of the sub-steps, each of which acts on the batches of its own role.
    needs_mask: whether it is undefined without a saliency mask.
    from_scratch: whether it trains a new model on the retain set, with the hyperparameters of training.
    for_language: whether it is defined for language models alone.
  """

  substeps: tuple[SubStep, ...]
  layout: str = "paired"
  needs_mask: bool = False
  from_scratch: bool = False
  for_language: bool = False

  @property
  def unlearns(self) -> bool:
    """Whether it takes steps from the original model."""
    return bool(self.substeps) and not self.from_scratch

  @property
  def roles(self) -> tuple[str, ...]:
    """The roles whose batches the method reads."""
    return tuple(
      role for role in ("retain", "forget") if any(role in substep.roles for substep in self.substeps)
    )

  @property
  def used_terms(self) -> frozenset[str]:
    """Names of the terms of all sub-steps."""
    return frozenset(name for substep in self.substeps for names in substep.terms if names for name in names)

  @property
  def reads(self) -> frozenset[str]:
    """Names of the fields of `config.method` that it reads, other than those that all methods read."""
    return frozenset().union(*(substep.reads for substep in self.substeps))

  @property
  def optimizers(self) -> tuple[str, ...]:
    """Names of the states of its base optimizers."""
    return tuple(dict.fromkeys(substep.optimizer for substep in self.substeps))

  @property
  def device_groups(self) -> int:
    """The number of groups of devices in `pmap`: two if a sub-step has both roles, else one."""
    return max((len(substep.roles) for substep in self.substeps), default=1)


def _plain(options, learning_rate, hyperparameters):
  del options, learning_rate, hyperparameters
  return transforms.plain()


def _average(options, learning_rate, hyperparameters):
  del options, learning_rate, hyperparameters
  return transforms.average()


def _add(options, learning_rate, hyperparameters):
  del options, learning_rate, hyperparameters
  return transforms.add()


def _gru(options, learning_rate, hyperparameters):
  del learning_rate
  return transforms.gru(max_norm=hyperparameters["max_norm"], reference_sign=options["reference_sign"])


def _pcgrad(options, learning_rate, hyperparameters):
  del learning_rate
  return transforms.pcgrad(max_norm=hyperparameters["max_norm"], reference_sign=options["reference_sign"])


# Fields of `config.method` that `transforms.hamu` takes as they are.
_HAMU_OPTIONS = (
  "share",
  "scope",
  "normalize_share",
  "on_infeasible",
  "stop_on_criterion",
  "criterion",
)


def _hamu(variant):
  def build(options, learning_rate, hyperparameters):
    constraint = hyperparameters["constraint"]
    if constraint is None:
      # The constraint is a multiple of the current rate.
      def constraint(count):
        return hyperparameters["constraint_ratio"] * learning_rate(count)

    return transforms.hamu(
      learning_rate,
      constraint,
      variant=variant,
      radius=hyperparameters["radius"],
      **{name: options[name] for name in _HAMU_OPTIONS},
    )

  return Transform(build, ("constraint", "constraint_ratio", "radius", *_HAMU_OPTIONS))


# One gradient unchanged, the mean of two, the sum of two.
PLAIN, AVERAGE, ADD = Transform(_plain), Transform(_average), Transform(_add)
_GRU, _PCGRAD = (Transform(build, ("max_norm", "reference_sign")) for build in (_gru, _pcgrad))


def _forget_weight(hyperparameters, epoch):
  """Coefficient of the ascended loss of neggrad and sharp_minmax: -(1 - w), w the retain weight."""
  del epoch
  return hyperparameters["retain_weight"] - 1


def _l1_weight(hyperparameters, epoch):
  """Coefficient `w (1 - e / (E - E0))` of the L1 norm in epoch e of E; 0 in the last E0 epochs."""
  epochs = jnp.asarray(hyperparameters["epochs"] - hyperparameters["l1_free_epochs"], jnp.result_type(float))
  # A safe divisor for a run without any L1 epoch.
  share = 1 - epoch / jnp.where(epochs > 0, epochs, 1)
  return hyperparameters["l1_weight"] * jnp.where(epoch < epochs, share, 0)


def _negative_forget_coefficient(hyperparameters, epoch):
  """Coefficient of an ascended term of a language model's method."""
  del epoch
  return -hyperparameters["forget_coefficient"]


_FORGET_WEIGHT = Schedule(_forget_weight, ("retain_weight",))
_L1_WEIGHT = Schedule(_l1_weight, ("epochs", "l1_weight", "l1_free_epochs"))
_ASCENDED = Schedule(_negative_forget_coefficient, ("forget_coefficient",))


def _one(retain, forget, transform, **options) -> Method:
  """A method of one sub-step."""
  return Method((SubStep(retain, forget, transform, **options),))


def _of_both_losses(transform) -> Method:
  """A method whose transform knows the roles and takes the gradients of both plain losses."""
  return _one({"ce": 1.0}, {"ce": 1.0}, transform, one_loss=False)


def _for_language(retain, forget) -> Method:
  """A method that descends the sum of its terms, each with its role's coefficient."""
  return _one(retain, forget, ADD)._replace(for_language=True)


_RANDOM_LABEL = Method((SubStep({"random_label": 1.0}, None, PLAIN),), layout="merged")

# NAME_kl is the same method with KL to the original model in place of the retain loss.
_FORGET_TERMS = {
  "npo": {"npo": "forget_coefficient"},
  "simnpo": {"simnpo": "forget_coefficient"},
  "dpo": {"dpo": "forget_coefficient"},
  "idk": {"alternative": "forget_coefficient"},
  "undial": {"undial": "forget_coefficient"},
  "wga": {"weighted_ce": _ASCENDED},
}
_FOR_LANGUAGE = {
  **{name: _for_language({"ce": "retain_coefficient"}, forget) for name, forget in _FORGET_TERMS.items()},
  **{
    f"{name}_kl": _for_language({"kl": "retain_coefficient"}, forget)
    for name, forget in _FORGET_TERMS.items()
  },
  "rmu": _for_language({"hidden": "retain_coefficient"}, {"misdirection": "forget_coefficient"}),
}

METHODS: dict[str, Method] = {
  "ft": _one({"ce": 1.0}, None, PLAIN),
  "ga": _one(None, {"ce": -1.0}, PLAIN),
  "gdiff": _one({"ce": 1.0}, {"ce": -1.0}, AVERAGE),
  "kl": _one({"kl": 1.0}, {"ce": -1.0}, AVERAGE),
  "scrub": _one({"ce": "gamma", "kl": "alpha"}, {"kl": -1.0}, AVERAGE),
  "gru": _of_both_losses(_GRU),
  "pcgrad": _of_both_losses(_PCGRAD),
  "hamu-q": _of_both_losses(_hamu("hamu-q")),
  "hamu-u": _of_both_losses(_hamu("hamu-u")),
  "retrain": _one({"ce": 1.0}, None, PLAIN)._replace(from_scratch=True),
  "none": Method(()),
  "ft_l1": _one({"ce": 1.0, "l1": _L1_WEIGHT}, None, PLAIN),
  "neggrad": _one({"ce": "retain_weight"}, {"ce": _FORGET_WEIGHT}, ADD),
  "random_label": _RANDOM_LABEL,
  "salun": _RANDOM_LABEL._replace(needs_mask=True),
  "scrub_distill": Method(
    (
      SubStep(None, {"distillation": -1.0}, PLAIN, epochs="msteps"),
      SubStep({"ce": "gamma", "distillation": "beta"}, None, PLAIN),
    ),
    layout="passes",
  ),
  "sharp_minmax": Method(
    (
      SubStep({"ce": "retain_weight"}, None, PLAIN, moves="rest", optimizer="retain", mode="retain_mode"),
      SubStep(None, {"ce": _FORGET_WEIGHT}, PLAIN, moves="salient", optimizer="forget", mode="forget_mode"),
    ),
    needs_mask=True,
  ),
  **_FOR_LANGUAGE,
}

# Training from scratch is the same step with one role, the examples that the stage retains.
TRAINING = METHODS["ft"]


def needs_reference(method: Method, terms: Mapping[str, Any]) -> bool:
  """Whether any sub-step reads the frozen original model."""
  return any(terms[name].needs_reference for name in method.used_terms)
