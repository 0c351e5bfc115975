"""Drives a stage of one model, or of several together: chunks of steps on the device, all else between them.

Logging, progress, evaluation, checkpoints and signals are handled here, between device programs; the
step itself is `step.make_step`.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import serialization

from hamu_jax import data as data_lib
from hamu_jax.engine import methods, optimizers
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.placement import place
from hamu_jax.engine.train_state import TrainState, create_state
from hamu_jax.run import checkpoints as checkpoints_lib
from hamu_jax.run import hosts, preemption
from hamu_jax.run import rundir as rundir_lib
from hamu_jax.transforms import BRANCHES
from hamu_jax.transforms.stop import Stop

Tree = Any
# Work between two looks at the clock, signals and logs.
_CHUNK_SECONDS = 1.0


class Stage(NamedTuple):
  """One run of the loop.

  Attributes:
    name: `pretrain`, `retrain`, `unlearn`, or `memorization` and the number of its group's first model.
    method: a row of the method table.
    options: `config.train`, `config.method` or `config.memorization`.
    plan: which examples each step reads.
    total_steps: length of the stage.
    seed: seed of the stage's randomness on the device.
    train: whether it trains a new model; any other is evaluated before its first step, too.
    training_mode: whether the model runs in training mode, see `step.make_step`.
    microbatch: see `objectives.role_gradient`.
    best: (summary) -> the score by which the best evaluated model is kept, or None to keep the last.
    sam: `config.sam` with this stage's `rho`, or None for plain gradients.
    mask_scope: see `step.make_step`.
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
  frozen: step_lib.Frozen
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


@dataclasses.dataclass
class _Track:
  """What the host knows of one model; all but the model itself is in the checkpoint's JSON part."""

  best: Tree
  best_score: float = -1.0
  evaluated: int = -1
  # Of the best model where the stage selects, else of the last evaluated one.
  evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)
  last_metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

  def meta(self) -> dict[str, Any]:
    """The JSON values."""
    return rundir_lib.jsonable(
      {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "best"}
    )


@dataclasses.dataclass
class _Position:
  """Where a stage stands: the state, with a leading axis where there are several models, and their tracks."""

  state: TrainState
  tracks: list[_Track]
  seconds: float = 0.0

  def states(self) -> list[TrainState]:
    """The state of each model."""
    return _split(self.state, len(self.tracks))

  def progress(self) -> list[tuple[int, bool]]:
    """For each model: steps applied so far, and whether a stop has ended its stage."""
    steps, stops = np.atleast_1d(self.state.step), np.atleast_1d(self.state.stop)
    return [(int(step), bool(stop != Stop.NONE)) for step, stop in zip(steps, stops, strict=True)]

  def step(self) -> int:
    """Steps applied so far by the models that go on, or by all where none does."""
    progress = self.progress()
    return max([step for step, stopped in progress if not stopped] or [step for step, _ in progress])

  def arrays(self) -> Tree:
    """The array part of a checkpoint."""
    return serialization.to_state_dict({"state": self.state, "best": [track.best for track in self.tracks]})

  def meta(self) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return {"tracks": [track.meta() for track in self.tracks], "seconds": self.seconds}

  def restore(self, arrays: Tree, meta: dict[str, Any]) -> None:
    """Goes to where a checkpoint is."""
    like = {"state": self.state, "best": [track.best for track in self.tracks]}
    restored = serialization.from_state_dict(like, arrays)
    self.state, self.seconds = restored["state"], meta["seconds"]
    self.tracks = [
      _Track(best, **values) for best, values in zip(restored["best"], meta["tracks"], strict=True)
    ]


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
    schedule=optimizers.schedule_shape(stage.options.optimizer, stage.plan.position, stage.total_steps),
    sharpness=stage.sam and step_lib.Sharpness(stage.sam.adaptive, stage.sam.mode, stage.sam.scope),
    mask_scope=stage.mask_scope,
  )


@dataclasses.dataclass
class Loop:
  """What the stages of an experiment share; `run` runs one of them.

  Attributes:
    forward: (variables, batch, key, train) -> (`objectives.Outputs`, batch_stats).
    fetch: (augmentation name) -> (data, examples, key) -> batch.
    feed: delivers the data that `fetch` reads, see `vision.feed` and `language.feed`.
    evaluate: variables -> {split: {name: value}, name: value}; None if models are not evaluated.
    pairing: `sequential`, `vmap` or `pmap`.
    devices: devices that `pmap` uses.
    progress: (stage name, total steps, initial=) -> context manager with `update(step, values)`.
    watch: notices signals.
    checkpoint_seconds: time between two checkpoints.
    base: mesh or None -> the variables that no stage trains, on its devices.
    weights: devices that share one copy of those.
  """

  forward: Callable[..., Any]
  fetch: Callable[..., Any]
  feed: Any
  evaluate: Callable[[Tree], dict[str, Any]] | None
  pairing: str
  devices: tuple[jax.Device, ...]
  progress: Callable[..., Any]
  watch: preemption.Watch
  checkpoint_seconds: float
  base: Callable[[Any], Tree] = lambda mesh: {}
  weights: int = 1
  _programs: dict[Any, Any] = dataclasses.field(default_factory=dict)

  def program(self, stage: Stage, mesh: jax.sharding.Mesh | None) -> step_lib.StepProgram:
    """The step of a stage on the devices of a mesh, or on one."""
    return stage_program(
      stage,
      forward=self.forward,
      fetch=self.fetch(stage.options.augment),
      pairing=self.pairing,
      together=shared_axes(mesh),
    )

  def _program(self, stage: Stage, members: int, separate_indices: bool):
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
      mesh = None if members > 1 else stage_mesh(stage, self.pairing, self.devices, self.weights)
      program = self.program(stage, mesh)
      chunk = step_lib.compile_target(
        step_lib.make_chunk(program.step),
        mesh,
        stage.method.roles,
        members=members if members > 1 else 0,
        separate_indices=separate_indices,
        sharded_data=self.feed.sharded,
        base_specs=specs(self.base(mesh)),
      )
      self._programs[key] = (program, chunk, mesh)
    return self._programs[key]

  def run(self, members: Sequence[Member], path) -> list[Outcome]:
    """Runs a stage from its newest checkpoint, or from the start.

    Several members run as one program, mapped over their states, examples and hyperparameters. One whose
    stage ends early waits for the others. Each has the result that it has alone, up to the rounding of sums
    that the compiler may take in another order.

    Args:
      members: one or more.
      path: folder of the checkpoints, which hold all members.

    Raises:
      preemption.Preempted: the run was asked to end; its last good state is saved.
    """
    started = time.monotonic()
    stage, count = members[0].stage, len(members)
    plan, separate_indices = data_lib.join_plans([member.stage.plan for member in members])
    program, chunk, mesh = self._program(stage, count, separate_indices)
    hyperparameters = _join(
      [step_lib.hyperparameters_of(each.stage.options, each.stage.sam) for each in members]
    )
    self.feed.prepare(plan, stage.total_steps)

    def create(variables, seed, hyperparameters):
      return create_state(variables, program.optimizers(hyperparameters), seed)

    if count > 1:
      variables = _join([member.variables for member in members])
      seeds = jnp.asarray([member.stage.seed for member in members])
      state = jax.vmap(create)(variables, seeds, hyperparameters)
    else:
      state = create(members[0].variables, stage.seed, hyperparameters)
    frozen = _join([member.frozen._replace(base=None) for member in members])
    state, starts, frozen = place((state, [member.variables for member in members], frozen), mesh)
    position = _Position(state, [_Track(start) for start in starts])
    frozen = frozen._replace(base=self.base(mesh))
    checkpoints = checkpoints_lib.Checkpoints(path)
    if checkpoints.latest is not None:
      position.restore(*checkpoints.restore(position.arrays()))
      started -= position.seconds
    for member, track, (step, stopped) in zip(members, position.tracks, position.progress(), strict=True):
      # The step that a stop rejected is logged, too.
      member.rundir.truncate(member.stage.name, step + stopped, evaluated=track.evaluated)

    def save():
      position.seconds = time.monotonic() - started
      checkpoints.save(position.step(), position.arrays(), position.meta())

    try:
      with self.progress(stage.name, stage.total_steps, initial=position.step()) as bar:
        self._advance(
          members,
          plan,
          position,
          bar,
          save,
          lambda state, data, batches, count: chunk(state, frozen, data, batches, count, hyperparameters),
          mesh,
        )
    except preemption.Preempted:
      # Several processes were not all interrupted at one step; they go on from the last checkpoint.
      if jax.process_count() == 1:
        save()
      raise
    finally:
      checkpoints.close()
    seconds = (time.monotonic() - started) / count
    return [
      Outcome(
        variables=state.variables if self.evaluate is None else track.best,
        steps=int(state.step),
        stop=Stop(int(state.stop)),
        evaluation=track.evaluation,
        last_metrics=track.last_metrics,
        seconds=seconds,
      )
      for state, track in zip(position.states(), position.tracks, strict=True)
    ]

  def _advance(self, members, plan, position: _Position, bar, save, chunk, mesh) -> None:
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
        for member, track, state, is_due in zip(
          members, position.tracks, position.states(), due, strict=True
        ):
          if is_due:
            self._evaluate(member, track, state)
      if all(ended):
        return

      step = position.step()
      until = min([total_steps, *(at for at in due_at if at > step)])
      count = min(chunk_steps, until - step, self.feed.most_steps(plan))
      data, batches = self.watch.run(lambda: self.feed.chunk(plan, step, step + count, mesh))
      began = time.monotonic()
      state, metrics, done = self.watch.run(
        lambda: jax.block_until_ready(chunk(position.state, data, batches, jnp.int32(count)))
      )
      # Who ended before has done nothing, and nothing is logged of it.
      before = [at for at, _ in progress]
      position.state = state
      _log(members, position.tracks, before, *jax.device_get((metrics, done)))
      bar.update(position.step(), position.tracks[0].last_metrics)

      now = time.monotonic()
      # The first chunk's time includes compiling it.
      wanted = chunk_steps
      if timed:
        wanted = int(_CHUNK_SECONDS / max((now - began) / count, 1e-6))
      timed = True
      # Every process must take the same decisions, whatever its own clock and signals say.
      requested, save_due, negative_steps = hosts.agree(
        [
          self.watch.requested,
          now - saved_at > self.checkpoint_seconds,
          -min(max(wanted, 1), step_lib.CHUNK_CAPACITY),
        ]
      )
      chunk_steps = int(-negative_steps)
      if requested or save_due:
        save()
        saved_at = time.monotonic()
      if requested:
        raise preemption.Preempted

  def _evaluate(self, member: Member, track: _Track, state: TrainState) -> None:
    """Logs all splits and keeps the best evaluated model."""
    stage, step = member.stage, int(state.step)
    # A model placed on the mesh of `pmap` evaluates there; any other on the default device.
    evaluate = self.evaluate
    assert evaluate is not None  # Else no evaluation is due.
    summary = self.watch.run(lambda: evaluate(state.variables))
    aucs = {name: value for name, value in summary.items() if not isinstance(value, dict)}
    for split, values in summary.items():
      if isinstance(values, dict):
        member.rundir.write(stage.name, step, split, values)
    member.rundir.write(stage.name, step, "evaluation", aucs)
    score = stage.best(summary) if stage.best else track.best_score
    if not stage.best or score > track.best_score:
      track.best, track.best_score = state.variables, score
      track.evaluation = summary
    track.evaluated = step


def _log(members: Sequence[Member], tracks, before: Sequence[int], metrics, done) -> None:
  """Writes a row for each step of a chunk, for each run directory.

  Args:
    members: of the stage.
    tracks: of the members.
    before: steps that each had applied before the chunk.
    metrics: {name: [n]}, of several members {name: [members, n]}.
    done: how many steps each ran, [] or [members].
  """
  if len(members) == 1:
    metrics, done = jax.tree.map(lambda leaf: np.asarray(leaf)[None], (metrics, done))
  stops = metrics.pop("stop")
  sharing: dict[int, list[int]] = {}
  for k, member in enumerate(members):
    sharing.setdefault(id(member.rundir), []).append(k)
  for group in sharing.values():
    stage, rundir = members[group[0]].stage, members[group[0]].rundir
    for index in range(int(done[group].min())):
      values = {name: _mean(of_members[group, index]) for name, of_members in metrics.items()}
      values["applied"] = bool(np.all(stops[group, index] == Stop.NONE))
      values |= branch_fractions(values)
      values = _without_idle_roles(values)
      rundir.write(stage.name, before[group[0]] + index + 1, "step", values)
      for k in group:
        tracks[k].last_metrics = values


def _mean(values: np.ndarray):
  """The mean over members; of one alone, what it is."""
  return values[0] if len(values) == 1 else values.mean(0)


def _join(trees: Sequence[Tree]) -> Tree:
  """One tree with a leading axis; a single tree as it is."""
  return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _split(tree: Tree, count: int) -> list[Tree]:
  """The trees that `_join` joined."""
  if count == 1:
    return [tree]
  return [jax.tree.map(lambda leaf: leaf[k], tree) for k in range(count)]


def specs(base: Tree) -> Tree:
  """How arrays, or their shapes, lie on their mesh."""
  nothing = jax.sharding.PartitionSpec()
  return jax.tree.map(lambda leaf: getattr(leaf.sharding, "spec", nothing), base)


def _evaluation_steps(stage: Stage) -> frozenset[int]:
  """The steps before the last after which the stage is evaluated; unlearning also before its first."""
  every = stage.options.evaluate_epochs
  steps = set() if stage.train or not every else {0}
  number = 1
  while every and (at := round(stage.plan.position(number * every))) < stage.total_steps:
    steps.add(max(at, 1))
    number += 1
  return frozenset(steps)


def _without_idle_roles(values: dict[str, Any]) -> dict[str, Any]:
  """Leaves out what a step says of a role whose turn it was not."""
  idle = [role for role in ("retain", "forget") if not values.pop(f"{role}_active", True)]
  prefixes = tuple(f"{role}_" for role in idle)
  return {name: value for name, value in values.items() if not name.startswith(prefixes)}


def branch_fractions(values: dict[str, Any]) -> dict[str, float]:
  """Share of blocks in each of HAMU's branches, by `branch_<name>`; {} for other methods."""
  if "branch" not in values:
    return {}
  return {f"branch_{name}": float(np.mean(values["branch"] == code)) for code, name in enumerate(BRANCHES)}
