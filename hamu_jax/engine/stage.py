"""A stage of training or unlearning: what one run of the loop is given, and what it gives back."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections

from hamu_jax.engine import methods, optimizers, sub_step
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine import step as step_lib
from hamu_jax.transforms.stop import Stop

Tree = Any


class Stage(NamedTuple):
  """One run of the loop.

  Attributes:
    name: `pretrain`, `retrain`, `unlearn`, or `memorization` and the number of its group's first model.
    method: a row of the method table.
    options: `config.train`, `config.method` or `config.memorization`.
    plan: which examples each step reads.
    hyperparameters: what enters its steps as data, by name; None switches a feature off.
    total_steps: length of the stage.
    seed: seed of the stage's randomness on the device.
    train: whether it trains a new model; any other is evaluated before its first step, too.
    training_mode: whether the model runs in training mode, see `step.make_step`.
    microbatch: see `role_gradient.role_gradient`.
    best: (summary) -> the score by which the best evaluated model is kept, or None to keep the last.
    sam: `config.sam` with this stage's `rho`, or None for plain gradients.
    mask_scope: see `step.make_step`.
  """

  name: str
  method: methods.Method
  options: ml_collections.ConfigDict
  plan: Any
  hyperparameters: Mapping[str, Any]
  total_steps: int
  seed: int
  train: bool = False
  training_mode: bool = False
  microbatch: int = 0
  best: Callable[[Any], float] | None = None
  sam: ml_collections.ConfigDict | None = None
  mask_scope: str | None = None


class Member(NamedTuple):
  """One of the models that a run of the loop trains.

  Attributes:
    stage: what it goes through; those of members that are trained together have the same step, and
      differ in their seeds, examples and hyperparameters alone.
    variables: the model to start from.
    frozen: what its steps read beside the data and the base.
    rundir: where its metrics are logged; of members that share one, the means are.
  """

  stage: Stage
  variables: Tree
  frozen: sub_step.Frozen
  rundir: Any


class Outcome(NamedTuple):
  """What a stage produced.

  Attributes:
    variables: the final model, or the best evaluated one where the stage selects that.
    steps: applied steps.
    stop: why it ended; `Stop.NONE` after its last step.
    evaluation: `Evaluator.summary` of these variables.
    last_metrics: host values of the last step that ran, applied or not ({} if none ran).
    seconds: wall time, over all the processes that worked on it; of models that are trained together
      each has its share.
  """

  variables: Tree
  steps: int
  stop: Stop
  evaluation: dict[str, Any]
  last_metrics: dict[str, Any]
  seconds: float


def stage_mesh(stage: Stage, pairing: str, devices, weights: int) -> jax.sharding.Mesh | None:
  """The devices of a stage's steps as `pairing.make_mesh` arranges them; None if they run on one."""
  if pairing != "pmap":
    return None
  return pairing_lib.make_mesh(devices, stage.method.device_groups, weights)


def shared_axes(mesh: jax.sharding.Mesh | None) -> tuple[str, ...]:
  """The axes over which devices exchange frozen weights; none where each has its own."""
  if mesh is None or mesh.shape[pairing_lib.WEIGHTS_AXIS] == 1:
    return ()
  return pairing_lib.SHARE_AXES


def stage_program(
  stage: Stage, *, forward, fetch, pairing: str, exchange_axes: tuple[str, ...]
) -> step_lib.StepProgram:
  """The step of a stage; arguments as of `step.make_step`."""
  return step_lib.make_step(
    stage.method,
    stage.options,
    forward=forward,
    fetch=fetch,
    pairing=pairing,
    train=stage.training_mode,
    microbatch=stage.microbatch,
    exchange_axes=exchange_axes,
    schedule=optimizers.schedule_shape(stage.options.optimizer, stage.plan.position, stage.total_steps),
    sharpness=stage.sam and sub_step.Sharpness(stage.sam.adaptive, stage.sam.mode, stage.sam.scope),
    mask_scope=stage.mask_scope,
  )
