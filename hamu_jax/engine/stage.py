"""A stage of training or unlearning: the inputs and the outcome of one run of the loop."""

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
    method: row of the method table.
    options: `config.train`, `config.method` or `config.memorization`.
    plan: plan of the batches of each step.
    hyperparameters: values that enter its steps as data, by name; None switches a feature off.
    total_steps: number of steps.
    seed: seed of random numbers on the device.
    train: whether it trains a new model; a stage that does not is also evaluated before its first step.
    training_mode: whether the model runs in training mode, see `step.make_step`.
    microbatch: see `role_gradient.role_gradient`.
    best: (summary) -> score by which the best evaluated model is kept, or None to keep the last model.
    sam: `config.sam` with this stage's `rho`, or None for plain gradients.
    mask_scope: see `step.make_step`.
    keep_every: number of steps between two models that are left in the run directory; 0 keeps none.
    title: what the display calls it; "" is its name.
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
  keep_every: int = 0
  title: str = ""


class Member(NamedTuple):
  """One of the models that a run of the loop trains.

  Attributes:
    stage: stage to run. Stages of members that are trained together have the same step, and differ only in
      seeds, plans and hyperparameters.
    variables: variables to start from.
    frozen: reference model and mask that its steps read.
    rundir: run directory of its metrics. Members that share one log their means.
  """

  stage: Stage
  variables: Tree
  frozen: sub_step.Frozen
  rundir: Any


class Outcome(NamedTuple):
  """The result of a stage.

  Attributes:
    variables: variables of the final model, or of the best evaluated one if the stage selects it.
    steps: number of applied steps.
    stop: reason of the end; `Stop.NONE` after its last step.
    evaluation: `Evaluator.summary` of these variables.
    last_metrics: host values of the last step that ran, applied or not; {} if none ran.
    seconds: wall time, summed over interrupted and resumed runs; models that are trained together have equal
      shares.
    timing: `Timing.values` of the process that ended the stage.
  """

  variables: Tree
  steps: int
  stop: Stop
  evaluation: dict[str, Any]
  last_metrics: dict[str, Any]
  seconds: float
  timing: dict[str, Any] = {}


def stage_mesh(stage: Stage, pairing: str, devices, weights: int) -> jax.sharding.Mesh | None:
  """The mesh of `pairing.make_mesh` for the steps of a stage; None if they run on one device."""
  if pairing != "pmap":
    return None
  return pairing_lib.make_mesh(devices, stage.method.device_groups, weights)


def shared_axes(mesh: jax.sharding.Mesh | None) -> tuple[str, ...]:
  """The axes over which devices exchange frozen weights; () if each device has its own copy."""
  if mesh is None or mesh.shape[pairing_lib.WEIGHTS_AXIS] == 1:
    return ()
  return pairing_lib.SHARE_AXES


def stage_program(
  stage: Stage, *, forward, fetch, pairing: str, exchange_axes: tuple[str, ...]
) -> step_lib.StepProgram:
  """Builds the step of a stage; see `step.make_step` for the other arguments."""
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
