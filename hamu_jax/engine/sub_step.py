"""One sub-step: computes, masks and clips the gradients of its roles, and makes one update of them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

import sam_jax
from hamu_jax.engine import methods, objectives, optimizers
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.paired import Paired
from hamu_jax.transforms.stop import Stop

Tree = Any

_CLIP_EPS = 1e-6

SCOPES = ("auto", "step", "role")
MASK_SCOPES = ("update", "gradient", "perturbed")


class Frozen(NamedTuple):
  """Variables that a stage reads and never changes.

  Attributes:
    reference: variables of the original model; None if no term reads them.
    mask: pytree of zeros and ones, same structure as the parameters; None if all weights move.
    base: variables that no stage trains; {} if all are trained.
  """

  reference: Tree = None
  mask: Tree = None
  base: Tree = {}


class Sharpness(NamedTuple):
  """The kind of sharpness-aware gradients; their radius and weight are hyperparameters (`rho`, `lamb`).

  Attributes:
    adaptive: see `sam_jax.perturbation`.
    mode: "min" or "max".
    scope: "step" perturbs both roles by the sum of their gradients, "role" perturbs each role by its own
      gradient. "auto" is "step" if the update descends one loss, else "role".
  """

  adaptive: bool = False
  mode: str = "min"
  scope: str = "auto"


def clip(gradient: Tree, norm: jax.Array, max_norm: float | None) -> Tree:
  """Scales by `min(1, max_norm / (norm + 1e-6))`, PyTorch's `clip_grad_norm_`.

  Args:
    gradient: pytree of arrays.
    norm: scalar, its global norm.
    max_norm: None leaves the gradient as it is.
  """
  if max_norm is None:
    return gradient
  factor = jnp.minimum(1, max_norm / (norm + _CLIP_EPS))
  return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), gradient)


class SubStepProgram:
  """One sub-step of a method, as pure functions.

  Args:
    substep: sub-step of a row of `methods.METHODS`.
    options: see `step.make_step`; also for `pairing`, `train`, `schedule`, `sharpness` and `mask_scope`.
    role_function: (terms, merges) -> the function of `role_gradient.role_gradient`.
    exchanges: whether devices exchange something within that function.
  """

  def __init__(
    self,
    substep: methods.SubStep,
    options: ml_collections.ConfigDict,
    role_function,
    *,
    pairing: str,
    train: bool,
    schedule,
    sharpness: Sharpness | None,
    mask_scope: str | None,
    exchanges: bool,
  ):
    self.substep = substep
    self._options = options
    # Only declared fields, so that reading an undeclared one is an error in every run.
    self._declared = {name: options[name] for name in substep.transform.reads if name in options}
    self._schedule = schedule
    self._train = train
    self._sharpness = sharpness
    if sharpness and substep.mode:
      self._sharpness = sharpness._replace(mode=options[substep.mode])
    # Without a perturbed point there is only one gradient to mask.
    self._mask_scope = "gradient" if mask_scope == "perturbed" and not sharpness else mask_scope
    scope = sharpness.scope if sharpness else "step"
    self._by_role = scope == "role" or (scope == "auto" and not substep.one_loss)

    own_function = functools.partial(role_function, merges=train and len(substep.roles) > 1)
    # The hyperparameters and the mask that `sharpen` needs are known only inside a step.
    self._gradients = lambda sharpen: pairing_lib.make_gradients(
      pairing, own_function, substep.terms, train=train, sharpen=sharpen, exchanges=exchanges
    )

  def optimizer(self, hyperparameters):
    """The transform, followed by the base optimizer."""

    def learning_rate(count):
      return hyperparameters["learning_rate"] * self._schedule(count)

    return optax.chain(
      self.substep.transform.build(self._declared, learning_rate, hyperparameters),
      optimizers.make_optimizer(self._options.optimizer, learning_rate),
    )

  def apply(self, variables, opt_state, frozen, inputs, indices, epoch):
    """-> params, batch_stats, opt_state, metrics, stop code."""
    hyperparameters, params = inputs.hyperparameters, variables["params"]
    mask = self._mask(frozen)
    means = self._means(variables, inputs, indices, epoch, mask)
    if mask is not None and self._mask_scope != "perturbed":
      means = jax.tree.map(
        lambda mean: mean._replace(gradient=sam_jax.apply_mask(mean.gradient, mask)),
        means,
        is_leaf=_is_means,
      )
    clipped, metrics = _clipped_gradients(means, hyperparameters["clip_norm"])
    updates, opt_state = self.optimizer(hyperparameters).update(
      clipped.retain, opt_state, params, forget_grads=clipped.forget
    )
    if mask is not None and self._mask_scope == "update":
      updates = sam_jax.apply_mask(updates, mask)
    metrics["update_norm"] = optax.tree.norm(updates)
    stop = _stop_code(opt_state[0], metrics, self._options, hyperparameters)
    if hasattr(opt_state[0], "diagnostics"):
      metrics |= opt_state[0].diagnostics._asdict()
    batch_stats = variables["batch_stats"]
    if self._train:
      batch_stats = _running_statistics(batch_stats, means)
    return optax.apply_updates(params, updates), batch_stats, opt_state, metrics, stop

  def _mask(self, frozen: Frozen):
    """The mask of the weights that this sub-step moves; None if all move."""
    if self._mask_scope is None:
      return None
    return frozen.mask if self.substep.moves == "salient" else sam_jax.complement(frozen.mask)

  def _means(self, variables, inputs, indices, epoch, mask) -> Paired:
    """The means of both roles over their batches, with gradients that are sharpness-aware if asked for."""
    coefficients = self.substep.coefficients(inputs.hyperparameters, epoch)

    def sharpen(at):
      return self._sharpen(at, inputs.hyperparameters, mask)

    if self._by_role:
      return self._gradients(sharpen)(variables, inputs, indices, coefficients)
    gradients = self._gradients(lambda at: at)

    def at(params, coefficients):
      return gradients({**variables, "params": params}, inputs, indices, coefficients)

    return sharpen(at)(variables["params"], coefficients)

  def _sharpen(self, at, hyperparameters, mask):
    """Makes the gradients of `at`, (params, coefficients) -> means of one or both roles, sharpness-aware."""
    if self._sharpness is None:
      return at

    def gradients_and_means(means):
      return [mean.gradient for mean in jax.tree.leaves(means, is_leaf=_is_means)], means

    def perturbed(params, coefficients):
      gradients, means = gradients_and_means(at(params, coefficients))
      if mask is not None and self._mask_scope == "perturbed":
        gradients = [sam_jax.apply_mask(gradient, mask) for gradient in gradients]
      return gradients, means

    def sharp(params, coefficients):
      clean = jax.tree.map(
        objectives.clean_coefficients, coefficients, is_leaf=lambda node: isinstance(node, dict)
      )
      gradients, means = sam_jax.sharpness_aware(
        lambda point: gradients_and_means(at(point, clean)),
        perturbed_grad_fn=lambda point: perturbed(point, coefficients),
        rho=hyperparameters["rho"],
        lamb=hyperparameters["lamb"],
        adaptive=self._sharpness.adaptive,
        mode=self._sharpness.mode,
        has_aux=True,
        direction=_sum_of_trees,
      )(params)
      gradients = iter(gradients)
      return jax.tree.map(lambda mean: mean._replace(gradient=next(gradients)), means, is_leaf=_is_means)

    return sharp


def _is_means(node) -> bool:
  return isinstance(node, pairing_lib.RoleMeans)


def _sum_of_trees(trees):
  return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def _running_statistics(before: Tree, means: Paired) -> Tree:
  """The running statistics after the retain and then the forget batch.

  Each role moved them from the same start s by the batch statistics b with the momentum m of the layer:
  s_r = s + m (b_r - s) and s_f = s + m (b_f - s). One after the other gives
  (1 - m) s_r + m b_f = s_f + (1 - m) (s_r - s).
  """
  present = [mean.batch_stats for mean in means if mean is not None]
  if len(present) == 1 or not before:
    return present[0]
  retain, forget = present
  return jax.tree.map(
    lambda s, s_r, s_f, retained: s_f + retained * (s_r - s),
    before,
    retain.updated,
    forget.updated,
    forget.retained,
  )


def _clipped_gradients(means: Paired, max_norm):
  """Returns the Paired clipped gradients, and the logged values {name: scalar} of both roles."""
  metrics = {}

  def one(role, mean):
    if mean is None:
      return None
    norm = optax.tree.norm(mean.gradient)
    for name, value in mean.values.items():
      metrics[f"{role}_{'loss' if name == 'ce' else name}"] = value
    metrics[f"{role}_grad_norm"] = norm
    return clip(mean.gradient, norm, max_norm)

  return Paired(*(one(role, mean) for role, mean in means._asdict().items())), metrics


def _stop_code(transform_state, metrics, options, hyperparameters):
  """The `Stop` code of an update: first NONFINITE, then the transform's code, then that of a loss."""
  stop = jnp.asarray(Stop.NONE, jnp.int32)
  if options.get("stop_on_loss"):
    if "forget_loss" in metrics:
      stop = jnp.where(metrics["forget_loss"] < hyperparameters["min_forget_loss"], Stop.FORGET_LOSS, stop)
    if "retain_loss" in metrics:
      stop = jnp.where(metrics["retain_loss"] > hyperparameters["max_retain_loss"], Stop.RETAIN_LOSS, stop)
  if hasattr(transform_state, "stop"):
    stop = jnp.where(transform_state.stop == Stop.NONE, stop, transform_state.stop)
  # A gradient that is not finite has a norm that is not finite, which is among the metrics.
  finite = jnp.all(jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))))
  return jnp.where(finite, stop, Stop.NONFINITE).astype(jnp.int32)
