"""The step of every method, built from its row of the method table and its options."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax import lax

from hamu_jax.engine import methods, sub_step
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine import role_gradient as role_gradient_lib
from hamu_jax.engine.train_state import TrainState
from hamu_jax.transforms.stop import Stop

# Keys of epochs are derived under this number, which no step has.
_EPOCHS = 2**32 - 1


class Batches(NamedTuple):
  """The batches of a chunk, with a leading axis of CHUNK_CAPACITY steps, or of one step without this axis.

  Attributes:
    indices: Paired [n, B] int32 indices of each role, -1 for padding, None for a role that is not read; under
      `pmap` the result of `pairing.shard_indices`.
    epoch: [n] int32 epoch of each step.
  """

  indices: Any
  epoch: Any


class StepProgram(NamedTuple):
  """A step and its optimizers.

  Attributes:
    step: (state, Frozen, data, Batches, hyperparameters) -> (state, metrics), pure.
    optimizers: (hyperparameters) -> one optax transformation for each of `Method.optimizers`.
  """

  step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
  optimizers: Callable[..., tuple[optax.GradientTransformation, ...]]


def make_step(
  method: methods.Method,
  options: ml_collections.ConfigDict,
  *,
  forward,
  fetch,
  pairing: str,
  train: bool,
  schedule,
  microbatch: int = 0,
  exchange_axes: tuple[str, ...] = (),
  sharpness: sub_step.Sharpness | None = None,
  mask_scope: str | None = None,
) -> StepProgram:
  """Builds the step of any method.

  Each sub-step computes the gradients of its roles, sharpness-aware if `sharpness` is given, and masks and
  clips each of them. The transform makes one equivalent gradient of them, which the base optimizer applies.
  A step is accepted or rejected as a whole. It is rejected if the transform stopped, a loss crossed its
  threshold or a value is not finite; it then returns the old state with `stop` set.

  Args:
    method: row of `methods.METHODS`.
    options: `config.method`, or `config.train` for training.
    forward: (variables, batch, key, train) -> (`objectives.Outputs`, batch_stats).
    fetch: (data, indices [B], key) -> batch.
    pairing: `sequential`, `vmap` or `pmap`.
    train: whether the model runs in training mode: batch norm on batch statistics, dropout on.
    schedule: (step count) -> multiple of the peak learning rate.
    microbatch: see `role_gradient.role_gradient`.
    exchange_axes: see `role_gradient.role_gradient`; for `pmap`.
    sharpness: kind of sharpness-aware gradients; None for plain gradients.
    mask_scope: None moves all weights. "update" does not move weights outside the mask. "gradient" masks
      only the gradient, so that weight decay still moves them. "perturbed" masks only the gradient at the
      perturbed point, as the sharpness paper's code does.
  """

  def role_function(terms, merges):
    return role_gradient_lib.role_gradient(
      forward,
      fetch,
      terms,
      train=train,
      microbatch=microbatch,
      exchange_axes=exchange_axes,
      merges=merges,
    )

  programs = tuple(
    sub_step.SubStepProgram(
      substep,
      options,
      role_function,
      pairing=pairing,
      train=train,
      schedule=schedule,
      sharpness=sharpness,
      mask_scope=mask_scope,
      exchanges=bool(exchange_axes),
    )
    for substep in method.substeps
  )
  step = _Step(method, programs, pairing, schedule)
  return StepProgram(step, step.optimizers)


class _Step:
  """The step of a method: its sub-steps one after the other, accepted or rejected as a whole."""

  def __init__(
    self, method: methods.Method, programs: tuple[sub_step.SubStepProgram, ...], pairing, schedule
  ):
    self._method, self._programs = method, programs
    self._pairing, self._schedule = pairing, schedule

  def optimizers(self, hyperparameters):
    """The transform and base optimizer of each name; sub-steps with the same name share them."""
    by_name = {program.substep.optimizer: program for program in self._programs}
    return tuple(by_name[name].optimizer(hyperparameters) for name in self._method.optimizers)

  def __call__(self, state: TrainState, frozen: sub_step.Frozen, data, batches: Batches, hyperparameters):
    """-> (state, metrics)."""
    key = jax.random.wrap_key_data(state.rng)
    inputs = role_gradient_lib.Inputs(
      frozen.base,
      frozen.reference,
      data,
      jax.random.fold_in(key, state.step),
      jax.random.fold_in(jax.random.fold_in(key, _EPOCHS), batches.epoch),
      hyperparameters,
    )
    run = self._run_pass if self._method.layout == "passes" else self._run
    metrics: dict[str, jax.Array] = {}
    proposed = state
    stop = jnp.asarray(Stop.NONE, jnp.int32)
    for program in self._programs:
      proposed, own_metrics, own_stop = run(program, proposed, frozen, inputs, batches)
      if len(self._programs) > 1:
        (role,) = program.substep.roles
        own_metrics[f"{role}_update_norm"] = own_metrics.pop("update_norm")
      metrics |= own_metrics
      stop = jnp.where(stop == Stop.NONE, own_stop, stop).astype(jnp.int32)
    accepted = stop == Stop.NONE
    metrics["learning_rate"] = jnp.asarray(hyperparameters["learning_rate"] * self._schedule(state.step))
    metrics["stop"] = stop
    proposed = proposed.replace(step=state.step + 1)
    # A zero gradient alone would still move AdamW, so a rejected step returns the whole old state.
    state = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), proposed, state)
    return state.replace(stop=stop), metrics

  def _run(self, program: sub_step.SubStepProgram, state: TrainState, frozen, inputs, batches: Batches):
    """-> updated state, metrics, stop code of a sub-step."""
    slot = self._method.optimizers.index(program.substep.optimizer)
    params, batch_stats, opt_state, metrics, stop = program.apply(
      state.variables, state.opt_state[slot], frozen, inputs, batches.indices, batches.epoch
    )
    opt_states = (*state.opt_state[:slot], opt_state, *state.opt_state[slot + 1 :])
    proposed = state.replace(params=params, batch_stats=batch_stats, opt_state=opt_states)
    return proposed, metrics, stop

  def _run_pass(self, program: sub_step.SubStepProgram, state: TrainState, frozen, inputs, batches: Batches):
    """Runs a sub-step unless the batch of its role is all padding."""
    (role,) = program.substep.roles
    active = pairing_lib.anywhere(getattr(batches.indices, role) >= 0, self._pairing)

    def run():
      return self._run(program, state, frozen, inputs, batches)

    def skip():
      zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run))
      return state, *zeros[1:]

    state, metrics, stop = lax.cond(active, run, skip)
    return state, metrics | {f"{role}_active": active}, stop
