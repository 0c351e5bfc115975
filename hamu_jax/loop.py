"""Drives one stage: chunks of steps on the device, everything else between them.

Logging, progress, evaluation, checkpoints and signals are handled here, between device programs; the
step itself is `step.make_step`.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import serialization

from hamu_jax import checkpoints as checkpoints_lib
from hamu_jax import hosts, methods, optimizers, preemption
from hamu_jax import pairing as pairing_lib
from hamu_jax import step as step_lib
from hamu_jax.source import place
from hamu_jax.train_state import TrainState, create_state
from hamu_jax.transforms import BRANCHES
from hamu_jax.transforms.stop import Stop

Tree = Any
# Work between two looks at the clock, signals and logs.
_CHUNK_SECONDS = 1.0


class Stage(NamedTuple):
  """One run of the loop.

  Attributes:
    name: `pretrain`, `retrain`, `unlearn`, or `memorization` and the number of its first model.
    method: row of the method table.
    options: `config.train`, `config.method` or `config.memorization`.
    plan: which rows each step reads.
    total_steps: length of the stage.
    seed: seed of the stage's randomness on the device.
    train: whether it trains a new model; any other is evaluated before its first step, too.
    training_mode: whether the model runs in training mode, see `step.make_step`.
    microbatch: see `objectives.role_gradient`.
    best: (summary) -> the score by which the best evaluated model is kept, or None to keep the last.
    sam: `config.sam` with this stage's `rho`, or None for plain gradients.
    mask_scope: see `step.make_step`.
    members: if there are any, the stage trains as many models at once, each on its own rows; model k by
      the seed plus k. They are not evaluated.
  """

  name: str
  method: methods.Method
  options: ml_collections.ConfigDict
  plan: Any
  total_steps: int
  seed: int
  train: bool = False
  training_mode: bool = False
  microbatch: int = 0
  best: Callable[[Any], float] | None = None
  sam: ml_collections.ConfigDict | None = None
  mask_scope: str | None = None
  members: tuple[int, ...] = ()


class Outcome(NamedTuple):
  """What a stage produced.

  Attributes:
    variables: the final model, or the best evaluated one where the stage selects that.
    steps: applied steps.
    stop: why it ended; `Stop.NONE` after its last step.
    evaluation: `Evaluator.summary` of these variables.
    last_metrics: host values of the last step that ran, applied or not ({} if none ran).
    seconds: wall time, over all the processes that worked on it.
  """

  variables: Tree
  steps: int
  stop: Stop
  evaluation: dict[str, Any]
  last_metrics: dict[str, Any]
  seconds: float


@dataclasses.dataclass
class _Position:
  """Where a stage stands on the host; all but the state is in the checkpoint's JSON part."""

  state: TrainState
  best: Tree
  best_score: float = -1.0
  evaluated: int = -1
  # Of the best model where the stage selects, else of the last evaluated one.
  evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)
  seconds: float = 0.0
  last_metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

  def arrays(self) -> Tree:
    """The array part of a checkpoint.

    A stop is left out: whoever resumes runs the rejected step again, and hears what it has to say.
    """
    state = self.state.replace(stop=jnp.zeros_like(self.state.stop))
    return serialization.to_state_dict({"state": state, "best": self.best})

  def meta(self) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return {name: getattr(self, name) for name in ("best_score", "evaluated", "evaluation", "seconds")}


def stage_mesh(stage: Stage, pairing: str, devices, weights: int) -> jax.sharding.Mesh | None:
  """The devices of a stage's steps as `pairing.make_mesh` arranges them; None if they run on one."""
  if pairing != "pmap" or stage.members:
    return None
  return pairing_lib.make_mesh(devices, stage.method.device_groups, weights)


def shared_axes(mesh: jax.sharding.Mesh | None) -> tuple[str, ...]:
  """The axes over which devices exchange frozen weights; none where each has its own."""
  if mesh is None or mesh.shape[pairing_lib.WEIGHTS_AXIS] == 1:
    return ()
  return pairing_lib.SHARE_AXES


def stage_program(
    stage: Stage, *, forward, fetch, pairing: str, together: tuple[str, ...]
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
      together=together,
      schedule=optimizers.schedule_shape(
          stage.options.optimizer, stage.plan.position, stage.total_steps
      ),
      sharpness=stage.sam and step_lib.Sharpness(stage.sam.adaptive, stage.sam.mode, stage.sam.scope),
      mask_scope=stage.mask_scope,
  )


@dataclasses.dataclass
class Loop:
  """What the stages of one experiment share; `run` runs one of them.

  Attributes:
    forward: (variables, batch, key, train) -> (`objectives.Outputs`, batch_stats).
    fetch: (augmentation name) -> (data, rows, key) -> batch.
    source: the data that `fetch` reads, see `source.Resident` and `source.Streamed`.
    evaluate: variables -> {split: {name: value}, name: value}.
    pairing: `sequential`, `vmap` or `pmap`.
    devices: devices that `pmap` uses.
    rundir: where metrics are logged.
    progress: (stage name, total steps, initial=) -> context manager with `update(step, values)`.
    watch: notices signals.
    checkpoint_seconds: time between two checkpoints.
    base: mesh or None -> the variables that no stage trains, on its devices.
    weights: devices that share one copy of those.
  """

  forward: Callable[..., Any]
  fetch: Callable[..., Any]
  source: Any
  evaluate: Callable[[Tree], dict[str, Any]]
  pairing: str
  devices: tuple[jax.Device, ...]
  rundir: Any
  progress: Callable[..., Any]
  watch: preemption.Watch
  checkpoint_seconds: float
  base: Callable[[Any], Tree] = lambda mesh: {}
  weights: int = 1
  _programs: dict[Any, Any] = dataclasses.field(default_factory=dict)

  def _program(self, stage: Stage):
    """The stage's step and jitted chunk; stages with the same step share one compilation."""
    optimizer = stage.options.optimizer
    constant = optimizer.schedule == "constant" and not optimizer.warmup_epochs
    length = None if constant else (stage.plan.steps_per_epoch, stage.total_steps)
    key = (
        stage.training_mode, stage.microbatch, stage.mask_scope, len(stage.members), length,
        *(section and section.to_json(sort_keys=True) for section in (stage.options, stage.sam)),
    )
    if key not in self._programs:
      mesh = stage_mesh(stage, self.pairing, self.devices, self.weights)
      program = stage_program(
          stage, forward=self.forward, fetch=self.fetch(stage.options.augment), pairing=self.pairing,
          together=shared_axes(mesh),
      )
      chunk = step_lib.compile_target(
          step_lib.make_chunk(program.step), mesh, stage.method.roles,
          members=len(stage.members), sharded_data=self.source.sharded,
          base_specs=_specs(self.base(mesh)),
      )
      self._programs[key] = (program, chunk, mesh)
    return self._programs[key]

  def run(self, stage: Stage, variables: Tree, frozen: step_lib.Frozen, path) -> Outcome:
    """Runs a stage from its newest checkpoint, or from the start.

    Args:
      stage: what to run.
      variables: the model to start from; for an ensemble each leaf has a leading axis of members.
      frozen: what its steps read beside the data and the base.
      path: folder of the stage's checkpoints.

    Raises:
      preemption.Preempted: the run was asked to end; its last good state is saved.
    """
    started = time.monotonic()
    program, chunk, mesh = self._program(stage)
    settings = step_lib.settings_of(stage.options, stage.sam)
    self.source.prepare(stage.plan, stage.total_steps)

    def create(variables, seed):
      return create_state(variables, program.optimizers(settings), seed)

    if stage.members:
      seeds = stage.seed + jnp.asarray(stage.members)
      position = _Position(state=jax.vmap(create)(variables, seeds), best=variables)
    else:
      position = _Position(state=create(variables, stage.seed), best=variables)
    position.state, position.best, frozen = place((position.state, position.best, frozen), mesh)
    frozen = frozen._replace(base=self.base(mesh))
    checkpoints = checkpoints_lib.Checkpoints(path)
    if checkpoints.latest is not None:
      arrays, meta = checkpoints.restore(position.arrays())
      restored = serialization.from_state_dict(
          {"state": position.state, "best": position.best}, arrays
      )
      position = _Position(**restored, **meta)
      started -= position.seconds
    resumed = _applied(position.state)
    self.rundir.truncate(stage.name, resumed, evaluated=position.evaluated)

    def save():
      position.seconds = time.monotonic() - started
      checkpoints.save(_applied(position.state), position.arrays(), position.meta())

    try:
      with self.progress(stage.name, stage.total_steps, initial=resumed) as bar:
        self._advance(
            stage, position, bar, save,
            lambda state, data, feed, count: chunk(state, frozen, data, feed, count, settings),
            mesh,
        )
    except preemption.Preempted:
      # Several processes were not all interrupted at one step; they go on from the last checkpoint.
      if jax.process_count() == 1:
        save()
      raise
    finally:
      checkpoints.close()
    state = position.state
    return Outcome(
        variables=position.best,
        steps=_applied(state),
        stop=Stop(int(np.max(state.stop))),
        evaluation=position.evaluation,
        last_metrics=position.last_metrics,
        seconds=time.monotonic() - started,
    )

  def _advance(self, stage: Stage, position: _Position, bar, save, chunk, mesh) -> None:
    """Alternates chunks with what happens between them, until the stage ends."""
    saved_at = time.monotonic()
    chunk_steps, timed = 1, False
    due_at = _evaluation_steps(stage)
    while True:
      step = _applied(position.state)
      ended = step >= stage.total_steps or bool(np.any(position.state.stop != Stop.NONE))
      due = step in due_at or ended
      if due and position.evaluated != step and not stage.members:
        self._evaluate(stage, position)
      if ended:
        if stage.members:
          position.best = position.state.variables
        return

      until = min([stage.total_steps, *(at for at in due_at if at > step)])
      count = min(chunk_steps, until - step, self.source.most_steps(stage.plan))
      data, feed = self.watch.run(
          lambda: self.source.chunk(stage.plan, step, step + count, mesh)
      )
      began = time.monotonic()
      state, metrics, done = self.watch.run(
          lambda: jax.block_until_ready(chunk(position.state, data, feed, jnp.int32(count)))
      )
      position.state = state
      self._log(stage, position, step, *_of_members(stage, *jax.device_get((metrics, done))))
      bar.update(_applied(state), position.last_metrics)

      now = time.monotonic()
      # The first chunk's time includes compiling it.
      wanted = chunk_steps
      if timed:
        wanted = int(_CHUNK_SECONDS / max((now - began) / count, 1e-6))
      timed = True
      # Every process must take the same decisions, whatever its own clock and signals say.
      requested, save_due, negative_steps = hosts.agree([
          self.watch.requested,
          now - saved_at > self.checkpoint_seconds,
          -min(max(wanted, 1), step_lib.CHUNK_CAPACITY),
      ])
      chunk_steps = int(-negative_steps)
      if requested or save_due:
        save()
        saved_at = time.monotonic()
      if requested:
        raise preemption.Preempted

  def _evaluate(self, stage: Stage, position: _Position) -> None:
    """Logs all splits and keeps the best evaluated model."""
    step = _applied(position.state)
    # A model placed on the mesh of `pmap` evaluates there; any other on the default device.
    summary = self.watch.run(lambda: self.evaluate(position.state.variables))
    aucs = {name: value for name, value in summary.items() if not isinstance(value, dict)}
    for split, values in summary.items():
      if isinstance(values, dict):
        self.rundir.write(stage.name, step, split, values)
    self.rundir.write(stage.name, step, "evaluation", aucs)
    score = stage.best(summary) if stage.best else position.best_score
    if not stage.best or score > position.best_score:
      position.best, position.best_score = position.state.variables, score
      position.evaluation = summary
    position.evaluated = step

  def _log(self, stage: Stage, position: _Position, step: int, metrics, done: int) -> None:
    """Writes a row for each step of a chunk."""
    for index in range(done):
      values = {name: np.asarray(values[index]) for name, values in metrics.items()}
      values["applied"] = int(values.pop("stop")) == Stop.NONE
      values |= branch_fractions(values)
      values = _without_idle_roles(values)
      self.rundir.write(stage.name, step + index + 1, "step", values)
      position.last_metrics = values


def _specs(base: Tree) -> Tree:
  """How arrays lie on their mesh."""
  nothing = jax.sharding.PartitionSpec()
  return jax.tree.map(lambda leaf: getattr(leaf.sharding, "spec", nothing), base)


def _applied(state: TrainState) -> int:
  """Steps applied so far; the members of an ensemble step together."""
  return int(np.max(state.step))


def _evaluation_steps(stage: Stage) -> frozenset[int]:
  """The steps before the last after which the stage is evaluated; unlearning also before its first."""
  every = stage.options.evaluate_epochs
  steps = set() if stage.train or not every else {0}
  number = 1
  while every and (at := round(stage.plan.position(number * every))) < stage.total_steps:
    steps.add(max(at, 1))
    number += 1
  return frozenset(steps)


def _of_members(stage: Stage, metrics: Tree, done: np.ndarray) -> tuple[Tree, int]:
  """An ensemble's metrics as the means over its members."""
  if not stage.members:
    return metrics, int(done)
  means = {name: values.mean(0) for name, values in metrics.items()}
  return means | {"stop": metrics["stop"].max(0)}, int(done.min())


def _without_idle_roles(values: dict[str, Any]) -> dict[str, Any]:
  """Leaves out what a step says of a role whose turn it was not."""
  idle = [role for role in ("retain", "forget") if not values.pop(f"{role}_active", True)]
  prefixes = tuple(f"{role}_" for role in idle)
  return {name: value for name, value in values.items() if not name.startswith(prefixes)}


def branch_fractions(values: dict[str, Any]) -> dict[str, float]:
  """Share of blocks in each of HAMU's branches, by `branch_<name>`; {} for other methods."""
  if "branch" not in values:
    return {}
  return {
      f"branch_{name}": float(np.mean(values["branch"] == code)) for code, name in enumerate(BRANCHES)
  }
