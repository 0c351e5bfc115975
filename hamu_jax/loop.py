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
from hamu_jax import evaluation, hosts, methods, optimizers, preemption
from hamu_jax import pairing as pairing_lib
from hamu_jax import step as step_lib
from hamu_jax.paired import Paired
from hamu_jax.train_state import TrainState, create_state
from hamu_jax.transforms import BRANCHES
from hamu_jax.transforms.stop import Stop

Tree = Any
# Work between two looks at the clock, signals and logs.
_CHUNK_SECONDS = 1.0


class Stage(NamedTuple):
  """One run of the loop.

  Attributes:
    name: `pretrain`, `retrain` or `unlearn`.
    method: row of the method table.
    options: `config.train` or `config.method`.
    plan: which rows each step reads.
    total_steps: length of the stage.
    train: whether this trains a model (batch statistics in batch norm, best evaluated epoch kept).
    seed: seed of the stage's randomness on the device.
  """

  name: str
  method: methods.Method
  options: ml_collections.ConfigDict
  plan: Any
  total_steps: int
  train: bool
  seed: int


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


@dataclasses.dataclass
class Loop:
  """What the stages of one experiment share; `run` runs one of them.

  Attributes:
    forward: (variables, batch, key, train) -> (logits, batch_stats).
    fetch: (augmentation name) -> (data, rows, key) -> batch.
    data: arrays that `fetch` reads; they stay on the device.
    evaluator: evaluates a model on all splits.
    pairing: `sequential`, `vmap` or `pmap`.
    devices: devices that `pmap` uses.
    rundir: where metrics are logged.
    progress: (stage name, total steps, initial=) -> context manager with `update(step, values)`.
    watch: notices signals.
    checkpoint_seconds: time between two checkpoints.
  """

  forward: Callable[..., Any]
  fetch: Callable[..., Any]
  data: Tree
  evaluator: evaluation.Evaluator
  pairing: str
  devices: tuple[jax.Device, ...]
  rundir: Any
  progress: Callable[..., Any]
  watch: preemption.Watch
  checkpoint_seconds: float
  _programs: dict[Any, Any] = dataclasses.field(default_factory=dict)

  def _program(self, stage: Stage):
    """The stage's step and jitted chunk; stages with the same step share one compilation."""
    optimizer = stage.options.optimizer
    constant = optimizer.schedule == "constant" and not optimizer.warmup_epochs
    length = None if constant else (stage.plan.steps_per_epoch, stage.total_steps)
    key = (stage.train, stage.options.to_json(sort_keys=True), length)
    if key not in self._programs:
      program = step_lib.make_step(
          stage.method,
          stage.options,
          forward=self.forward,
          fetch=self.fetch(stage.options.augment),
          pairing=self.pairing,
          train=stage.train,
          schedule=optimizers.schedule_shape(
              optimizer, stage.plan.steps_per_epoch, stage.total_steps
          ),
      )
      mesh = None
      if self.pairing == "pmap":
        mesh = pairing_lib.make_mesh(self.devices, len(stage.method.roles))
      chunk = step_lib.compile_target(step_lib.make_chunk(program.step), self.pairing, mesh)
      self._programs[key] = (program, chunk, mesh)
    return self._programs[key]

  def run(self, stage: Stage, variables: Tree, reference: Tree, path) -> Outcome:
    """Runs a stage from its newest checkpoint, or from the start.

    Args:
      stage: what to run.
      variables: the model to start from.
      reference: variables of the frozen original model, or None if no term reads it.
      path: folder of the stage's checkpoints.

    Raises:
      preemption.Preempted: the run was asked to end; its last good state is saved.
    """
    started = time.monotonic()
    program, chunk, mesh = self._program(stage)
    settings = step_lib.settings_of(stage.options)
    position = _Position(
        state=create_state(variables, program.optimizers(settings), stage.seed), best=variables
    )
    position.state, position.best, reference, data = place(
        (position.state, position.best, reference, self.data), mesh
    )
    checkpoints = checkpoints_lib.Checkpoints(path)
    if checkpoints.latest is not None:
      arrays, meta = checkpoints.restore(position.arrays())
      restored = serialization.from_state_dict(
          {"state": position.state, "best": position.best}, arrays
      )
      position = _Position(**restored, **meta)
      started -= position.seconds
    resumed = int(position.state.step)
    self.rundir.truncate(stage.name, resumed, evaluated=position.evaluated)

    def save():
      position.seconds = time.monotonic() - started
      checkpoints.save(int(position.state.step), position.arrays(), position.meta())

    try:
      with self.progress(stage.name, stage.total_steps, initial=resumed) as bar:
        self._advance(
            stage, position, bar, save,
            lambda state, rows, count: chunk(state, reference, data, rows, count, settings),
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
        steps=int(state.step),
        stop=Stop(int(state.stop)),
        evaluation=position.evaluation,
        last_metrics=position.last_metrics,
        seconds=time.monotonic() - started,
    )

  def _advance(self, stage: Stage, position: _Position, bar, save, chunk, mesh) -> None:
    """Alternates chunks with what happens between them, until the stage ends."""
    every = 0
    if stage.options.evaluate_epochs:
      every = max(1, round(stage.options.evaluate_epochs * stage.plan.steps_per_epoch))
    saved_at = time.monotonic()
    chunk_steps, timed = 1, False
    while True:
      step = int(position.state.step)
      ended = step >= stage.total_steps or int(position.state.stop) != Stop.NONE
      due = (every > 0 and step % every == 0) or ended
      if due and position.evaluated != step and not (stage.train and step == 0):
        self._evaluate(stage, position)
      if ended:
        return

      until = min(stage.total_steps, (step // every + 1) * every if every > 0 else stage.total_steps)
      count = min(chunk_steps, until - step)
      rows = place_rows(stage.plan.rows(step, step + count), mesh)
      began = time.monotonic()
      state, metrics, done = self.watch.run(
          lambda: jax.block_until_ready(chunk(position.state, rows, jnp.int32(count)))
      )
      position.state = state
      self._log(stage, position, step, jax.device_get(metrics), int(done))
      bar.update(int(state.step), position.last_metrics)

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
    step = int(position.state.step)
    # A model placed on the mesh of `pmap` evaluates there; any other on the default device.
    summary = self.watch.run(lambda: self.evaluator.summary(position.state.variables))
    aucs = {name: value for name, value in summary.items() if not isinstance(value, dict)}
    for split, values in summary.items():
      if isinstance(values, dict):
        self.rundir.write(stage.name, step, split, values)
    self.rundir.write(stage.name, step, "evaluation", aucs)
    score = evaluation.selection_score(summary)
    if not stage.train or stage.options.select == "last" or score > position.best_score:
      position.best, position.best_score = position.state.variables, score
      position.evaluation = summary
    position.evaluated = step

  def _log(self, stage: Stage, position: _Position, step: int, metrics, done: int) -> None:
    """Writes a row for each step of a chunk."""
    for index in range(done):
      values = {name: np.asarray(values[index]) for name, values in metrics.items()}
      values["applied"] = int(values.pop("stop")) == Stop.NONE
      values |= branch_fractions(values)
      self.rundir.write(stage.name, step + index + 1, "step", values)
      position.last_metrics = values


def branch_fractions(values: dict[str, Any]) -> dict[str, float]:
  """Share of blocks in each of HAMU's branches, by `branch_<name>`; {} for other methods."""
  if "branch" not in values:
    return {}
  return {
      f"branch_{name}": float(np.mean(values["branch"] == code)) for code, name in enumerate(BRANCHES)
  }


def place(tree: Tree, mesh: jax.sharding.Mesh | None) -> Tree:
  """Puts arrays on the default device, or on every device of the mesh."""
  if mesh is None:
    return jax.device_put(tree)
  return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def place_rows(rows: Paired, mesh: jax.sharding.Mesh | None):
  """Puts the rows of a chunk on the device, padded to `CHUNK_CAPACITY` steps.

  Args:
    rows: for each role [n, B] int32, or None.
    mesh: where `pmap` splits them among devices.
  """
  def pad(leaf):
    missing = step_lib.CHUNK_CAPACITY - leaf.shape[0]
    return np.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1), constant_values=-1)

  if mesh is None:
    return jax.device_put(jax.tree.map(pad, rows))
  spec = jax.sharding.PartitionSpec(None, pairing_lib.ROLE_AXIS, pairing_lib.DATA_AXIS)
  return jax.device_put(
      pad(pairing_lib.shard_rows(rows, mesh)), jax.sharding.NamedSharding(mesh, spec)
  )
