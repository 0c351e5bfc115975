"""Runs a stage of one model, or of several together, in chunks of steps.

Logging, progress, evaluation, checkpoints and signals are handled here, between the device programs. The
step itself is built by `step.make_step`.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hamu_jax import data as data_lib
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import stage as stage_lib
from hamu_jax.engine import step as step_lib
from hamu_jax.engine import step_log
from hamu_jax.engine.feed import Feed
from hamu_jax.engine.placement import place
from hamu_jax.engine.position import Position, Track, join
from hamu_jax.engine.stage import Member, Outcome, Stage
from hamu_jax.engine.timing import Timing
from hamu_jax.engine.train_state import TrainState, create_state
from hamu_jax.run import checkpoints as checkpoints_lib
from hamu_jax.run import disk, hosts, preemption
from hamu_jax.transforms.stop import Stop

Tree = Any
# Seconds of device work between two looks at the clock, signals and logs.
_CHUNK_SECONDS = 1.0
# Folder of a run directory for the models of `Stage.keep_every`.
KEPT = "kept"


class _Program(NamedTuple):
  """The compiled program of a stage.

  Attributes:
    step: step and its optimizers.
    chunk: jitted chunk of steps.
    mesh: devices it runs on; None for one device.
  """

  step: step_lib.StepProgram
  chunk: Callable[..., Any]
  mesh: jax.sharding.Mesh | None


@dataclasses.dataclass
class Loop:
  """Runs the stages of an experiment, which share its model, data and programs.

  Attributes:
    forward: (variables, batch, key, train) -> (`objectives.Outputs`, batch_stats).
    fetch: (augmentation name) -> (data, indices, key) -> batch.
    feed: delivers the data that `fetch` reads and the indices.
    evaluate: variables -> {split: {name: value}, name: value}; None if models are not evaluated.
    pairing: `sequential`, `vmap` or `pmap`.
    devices: devices of `pmap`.
    progress: (stage name, total steps, initial=, title=, shown=) -> context manager with `phase(name)` and
      `update(step, values)`, such as `progress.Progress`.
    watch: watcher of signals.
    checkpoint_seconds: seconds between two checkpoints.
    base: (mesh or None) -> the variables that no stage trains, on its devices.
    weights: number of devices that share one copy of these variables.
    save: (folder, name, variables) -> writes a model; stages that keep models need it.
  """

  forward: Callable[..., Any]
  fetch: Callable[..., Any]
  feed: Feed
  evaluate: Callable[[Tree], dict[str, Any]] | None
  pairing: str
  devices: tuple[jax.Device, ...]
  progress: Callable[..., Any]
  watch: preemption.Watch
  checkpoint_seconds: float
  base: Callable[[Any], Tree] = lambda mesh: {}
  weights: int = 1
  save: Callable[[pathlib.Path, str, Tree], None] | None = None
  _programs: dict[Any, _Program] = dataclasses.field(default_factory=dict)

  def program(self, stage: Stage, mesh: jax.sharding.Mesh | None) -> step_lib.StepProgram:
    """The step of a stage on the devices of a mesh, or on one."""
    return stage_lib.stage_program(
      stage,
      forward=self.forward,
      fetch=self.fetch(stage.options.augment),
      pairing=self.pairing,
      exchange_axes=stage_lib.shared_axes(mesh),
    )

  def _program(self, stage: Stage, members: int, separate_indices: bool) -> _Program:
    """The stage's step and jitted chunk; stages with the same step share one compilation."""
    optimizer = stage.options.optimizer
    constant = optimizer.schedule == "constant" and not optimizer.warmup_epochs
    length = None if constant else (stage.plan.steps_per_epoch, stage.total_steps)
    key = (
      stage.training_mode,
      stage.microbatch,
      stage.mask_scope,
      members,
      separate_indices,
      length,
      *(section and section.to_json(sort_keys=True) for section in (stage.options, stage.sam)),
    )
    if key not in self._programs:
      # Models that are trained together share one device.
      mesh = None if members > 1 else stage_lib.stage_mesh(stage, self.pairing, self.devices, self.weights)
      program = self.program(stage, mesh)
      chunk = chunk_lib.compile_target(
        chunk_lib.make_chunk(program.step),
        mesh,
        stage.method.roles,
        members=members if members > 1 else 0,
        separate_indices=separate_indices,
        sharded_data=self.feed.sharded,
        base_specs=specs(self.base(mesh)),
      )
      self._programs[key] = _Program(program, chunk, mesh)
    return self._programs[key]

  def run(self, members: Sequence[Member], path) -> list[Outcome]:
    """Runs a stage from its newest checkpoint, or from the start.

    Several members run as one program, mapped over their states, indices and hyperparameters. A member whose
    stage ends early waits for the others. Each member gets the result that it would get alone, up to
    rounding, since the compiler may order sums differently.

    Args:
      members: one or more models to train.
      path: folder of the checkpoints, each of which holds all members.

    Raises:
      preemption.Preempted: the run was asked to end; its last good state is saved.
    """
    started, timing = time.monotonic(), Timing(len(members))
    stage = members[0].stage
    plan, separate_indices = data_lib.join_plans([member.stage.plan for member in members])
    program = self._program(stage, len(members), separate_indices)
    hyperparameters = join([member.stage.hyperparameters for member in members])
    self.feed.prepare(plan, stage.total_steps)
    position, frozen = self._start(members, program, hyperparameters)
    checkpoints = checkpoints_lib.Checkpoints(path)
    if (restored := checkpoints.restore(position.arrays())) is not None:
      position.restore(*restored)
      started -= position.seconds
    for member, track, (step, stopped) in zip(members, position.tracks, position.progress(), strict=True):
      # The step that a stop rejected is logged, too.
      member.rundir.truncate(member.stage.name, step + stopped, evaluated=track.evaluated)
      if step:
        known = {"last": track.last_metrics, "evaluation": track.evaluation, "evaluated": track.evaluated}
        member.rundir.restore(member.stage.name, step + stopped, **known)

    def save():
      position.seconds = time.monotonic() - started
      checkpoints.save(position.step(), position.arrays(), position.meta())

    def chunk(state, data, batches, count):
      return program.chunk(state, frozen, data, batches, count, hyperparameters)

    try:
      several = f"{stage.name} of {len(members)} experiments" if len(members) > 1 else ""
      options: dict[str, Any] = {"title": stage.title or several}
      if stage.train:
        # Training reads all examples in the place of those to retain.
        options["shown"] = {"retain_loss": "train_loss"}
      with self.progress(stage.name, stage.total_steps, initial=position.step(), **options) as bar:
        self._advance(members, plan, position, bar, save, chunk, program.mesh, timing)
    except preemption.Preempted:
      # Several processes were not all interrupted at one step; they go on from the last checkpoint.
      if jax.process_count() == 1:
        save()
      raise
    finally:
      checkpoints.close()
    seconds = (time.monotonic() - started) / len(members)
    return self._outcomes(position, seconds, timing.values(self.devices))

  def _start(self, members: Sequence[Member], program: _Program, hyperparameters) -> tuple[Position, Any]:
    """Returns the position before the first step, and what the steps read and never change."""

    def create(variables, seed, hyperparameters):
      return create_state(variables, program.step.optimizers(hyperparameters), seed)

    if len(members) > 1:
      variables = join([member.variables for member in members])
      seeds = jnp.asarray([member.stage.seed for member in members])
      state = jax.vmap(create)(variables, seeds, hyperparameters)
    else:
      state = create(members[0].variables, members[0].stage.seed, hyperparameters)
    frozen = join([member.frozen._replace(base=None) for member in members])
    state, starts, frozen = place((state, [member.variables for member in members], frozen), program.mesh)
    position = Position(state, [Track(start) for start in starts])
    return position, frozen._replace(base=self.base(program.mesh))

  def _outcomes(self, position: Position, seconds: float, timing: dict[str, Any]) -> list[Outcome]:
    """The outcome of each model; `seconds` is each model's share of the time."""
    return [
      Outcome(
        variables=state.variables if self.evaluate is None else track.best,
        steps=int(state.step),
        stop=Stop(int(state.stop)),
        evaluation=track.evaluation,
        last_metrics=track.last_metrics,
        seconds=seconds,
        timing=timing,
      )
      for state, track in zip(position.states(), position.tracks, strict=True)
    ]

  def _advance(self, members, plan, position: Position, bar, save, chunk, mesh, timing: Timing) -> None:
    """Alternates chunks with what happens between them, until the stage of every member has ended."""
    saved_at = time.monotonic()
    chunk_steps, timed = 1, False
    total_steps, due_at = members[0].stage.total_steps, _evaluation_steps(members[0].stage)
    while True:
      progress = position.progress()
      ended = [step >= total_steps or stopped for step, stopped in progress]
      due = [
        (end or step in due_at) and track.evaluated != step and self.evaluate is not None
        for end, (step, _), track in zip(ended, progress, position.tracks, strict=True)
      ]
      if any(due):
        for number, (member, track, state, is_due) in enumerate(
          zip(members, position.tracks, position.states(), due, strict=True), start=1
        ):
          if is_due:
            bar.phase("evaluating" if len(members) == 1 else f"evaluating {number}/{len(members)}")
            with timing.evaluation():
              self._evaluate(member, track, state)
      if all(ended):
        return

      bar.phase("" if timed else "compiling")
      step = position.step()
      until = min([total_steps, *(at for at in due_at if at > step), *_next_kept(members, step)])
      count = min(chunk_steps, until - step, self.feed.most_steps(plan))
      data, batches = self.watch.run(lambda: self.feed.chunk(plan, step, step + count, mesh))
      began = time.monotonic()
      with timing.chunk(count):
        state, metrics, done = self.watch.run(
          lambda: jax.block_until_ready(chunk(position.state, data, batches, jnp.int32(count)))
        )
      # A model whose stage ended before this chunk has run no step, and nothing is logged for it.
      before = [at for at, _ in progress]
      position.state = state
      step_log.log(members, position.tracks, before, *jax.device_get((metrics, done)))
      # Before the checkpoint, so that a resumed run lacks none.
      _keep(self.save, members, position, before)
      bar.update(position.step(), position.tracks[0].last_metrics)

      now = time.monotonic()
      # The first chunk's time includes compiling it.
      wanted = chunk_steps
      if timed:
        wanted = int(_CHUNK_SECONDS / max((now - began) / count, 1e-6))
      timed = True
      # Every process must take the same decisions, although clocks and signals differ.
      requested, save_due, negative_steps = hosts.agree(
        [
          self.watch.requested,
          now - saved_at > self.checkpoint_seconds,
          -min(max(wanted, 1), chunk_lib.CHUNK_CAPACITY),
        ]
      )
      chunk_steps = int(-negative_steps)
      if requested or save_due:
        save()
        saved_at = time.monotonic()
      if requested:
        raise preemption.Preempted

  def _evaluate(self, member: Member, track: Track, state: TrainState) -> None:
    """Logs all splits and keeps the best evaluated model."""
    stage, step = member.stage, int(state.step)
    # A model placed on the mesh of `pmap` evaluates there; any other on the default device.
    evaluate = self.evaluate
    assert evaluate is not None  # Else no evaluation is due.
    summary = self.watch.run(lambda: evaluate(state.variables))
    member.rundir.write_evaluation(stage.name, step, summary)
    score = stage.best(summary) if stage.best else track.best_score
    if not stage.best or score > track.best_score:
      track.best, track.best_score = state.variables, score
      track.evaluation = summary
    track.evaluated = step


def _next_kept(members: Sequence[Member], step: int) -> list[int]:
  """The next step of each member, if there is one, after which its model is kept."""
  periods = [member.stage.keep_every for member in members]
  return [step - step % period + period for period in periods if period]


def _keep(save, members: Sequence[Member], position: Position, before: Sequence[int]) -> None:
  """Writes the models of members that have just reached a step after which they are kept."""
  for number, (member, (step, _)) in enumerate(zip(members, position.progress(), strict=True)):
    period = member.stage.keep_every
    if period and not step % period and step > before[number] and member.rundir.writer:
      folder = member.rundir.path / KEPT
      with disk.writing(folder):
        folder.mkdir(exist_ok=True)
        save(folder, f"{member.stage.name}-{step:06}", position.states()[number].variables)


def specs(base: Tree) -> Tree:
  """The partition specs of arrays, or of their shapes, on their mesh."""
  nothing = jax.sharding.PartitionSpec()
  return jax.tree.map(lambda leaf: getattr(leaf.sharding, "spec", nothing), base)


def _evaluation_steps(stage: Stage) -> frozenset[int]:
  """The steps, but for the last, after which the stage is evaluated; 0 is before the first."""
  every = stage.options.evaluate_epochs
  steps = set() if stage.train or not every else {0}
  number = 1
  while every and (at := round(stage.plan.position(number * every))) < stage.total_steps:
    steps.add(max(at, 1))
    number += 1
  return frozenset(steps)
