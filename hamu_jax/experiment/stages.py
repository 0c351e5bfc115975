"""The stages of an experiment, each of which is run or taken from the cache."""

import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax

from hamu_jax import data as data_lib
from hamu_jax.config import readers
from hamu_jax.engine import loop as loop_lib
from hamu_jax.engine import methods, objectives, placement, sub_step
from hamu_jax.engine import stage as stage_lib
from hamu_jax.errors import UserError
from hamu_jax.experiment import masks, memorization, stage_plan
from hamu_jax.experiment.evaluations import Evaluations
from hamu_jax.experiment.preparation import Preparation
from hamu_jax.experiment.stop_reason import describe_stop
from hamu_jax.run import hosts, preemption, progress
from hamu_jax.run import rundir as rundir_lib
from hamu_jax.run.stage_cache import StageCache
from hamu_jax.transforms.stop import Stop

Tree = Any
Record = dict[str, Any]


class Stages:
  """The stages of a prepared experiment: memorization, pretrain, retrain, mask, unlearn, evaluate.

  Attributes:
    prepared: data, model and plan.
    cache: cache of finished stages.
    rundir: run directory for metrics.

  Args:
    prepared: see the attribute.
    workdir: folder for the checkpoints of the stage in progress.
    watch: watcher of signals.
    rundir: see the attribute.
    like: stages of an experiment that differs only in hyperparameters and seeds; programs are shared with it.
  """

  def __init__(
    self,
    prepared: Preparation,
    workdir: pathlib.Path,
    watch: preemption.Watch,
    rundir: rundir_lib.RunDir,
    like: "Stages | None" = None,
  ):
    self.prepared, self.rundir = prepared, rundir
    self.cache = StageCache(pathlib.Path(prepared.config.stage_cache or workdir / "stages"))
    if hosts.is_writer():
      self.cache.clean()
    self._workdir, self._watch, self._like = workdir, watch, like
    self._loop: loop_lib.Loop | None = None
    self._evaluations: Evaluations | None = None
    self._records: dict[str, Record] = {}

  @property
  def loop(self) -> loop_lib.Loop:
    """The loop that runs the stages; available after `prepare`."""
    assert self._loop is not None, "call prepare() first"
    return self._loop

  @property
  def evaluations(self) -> Evaluations:
    """The evaluations of models; available after `prepare`."""
    assert self._evaluations is not None, "call prepare() first"
    return self._evaluations

  def prepare(self) -> dict[str, Record]:
    """Makes the loop and the evaluator, unless they are there already.

    If an ensemble's scores choose the forget set, the ensemble is trained first.

    Returns:
      The records of the stages that ran, by name.
    """
    if self._loop is not None:
      return self._records
    prepared = self.prepared
    if prepared.task.request.estimates_scores:
      estimate = self.estimate_memorization()
      self._records["memorization"] = {"seconds": estimate.seconds}
      prepared.choose_split(estimate.scores)
    if self._like is None:
      evaluator = prepared.task.evaluator(prepared.split, prepared.scores, prepared.evaluation_mesh)
      self._loop = self._make_loop(prepared.config.pairing, evaluator.summary)
    else:
      evaluator, self._loop = self._like.evaluations.evaluator, self._like.loop
    self._evaluations = Evaluations(prepared, evaluator, self.cache, self._watch)
    return self._records

  def _make_loop(self, pairing: str, evaluate: Callable[[Tree], Record] | None) -> loop_lib.Loop:
    """The loop over this experiment's model and data."""
    prepared, config = self.prepared, self.prepared.config
    return loop_lib.Loop(
      forward=prepared.task.forward(pairing),
      fetch=prepared.task.fetch,
      feed=prepared.task.feed(prepared.split),
      evaluate=evaluate,
      pairing=pairing,
      devices=prepared.devices,
      progress=functools.partial(progress.Progress, enabled=hosts.is_writer()),
      watch=self._watch,
      checkpoint_seconds=config.checkpoint_seconds,
      base=prepared.task.base,
      weights=config.mesh.weights,
      save=prepared.task.save,
    )

  def checkpoints(self, key: str) -> pathlib.Path:
    """The folder of a stage's checkpoints."""
    return self._workdir / "checkpoints" / key

  def keys(self) -> dict[str, str]:
    """The keys of the stages that train a model, by name, in order; a model that is read has none."""
    prepared = self.prepared
    unused = {"pretrain"} if prepared.imported is not None else set()
    if not readers.retrains(prepared.config):
      unused.add("retrain")
    return {name: prepared.plan.keys[name] for name in prepared.plan.stages if name not in unused}

  def lacks(self, name: str) -> bool:
    """Whether a stage is not in the cache."""
    # Processes must agree, because another run may publish the stage between their looks.
    return bool(hosts.agree(self.cache.outcome(name, self.prepared.plan.keys[name]) is None))

  def member(self, name: str) -> stage_lib.Member:
    """The member of a stage for the loop; the stages before it are run or taken from the cache first."""
    if name != "unlearn":
      # Pretraining and retraining start from the same untrained model.
      with progress.Progress("initializing the model", enabled=hosts.is_writer()):
        start = self._watch.run(lambda: self.prepared.init(self.prepared.config.seed))
      return self._member(name, start, sub_step.Frozen())
    original, _ = self.original()
    mask, _ = self.mask(original)
    return self._member(name, original, self.frozen(original, mask))

  def _member(self, name: str, start: Tree, frozen: sub_step.Frozen) -> stage_lib.Member:
    return stage_lib.Member(self.prepared.plan.stages[name], start, frozen, self.rundir)

  def frozen(self, original: Tree, mask: Tree | None) -> sub_step.Frozen:
    """The reference model and the mask that unlearning reads."""
    needed = methods.needs_reference(self.prepared.method, objectives.TERMS)
    return sub_step.Frozen(original if needed else None, mask)

  def publish(self, name: str, outcome: stage_lib.Outcome, *, together: int = 1) -> Record:
    """Adds a stage's model and evaluation to the cache.

    Args:
      name: name of the stage.
      outcome: outcome of the loop.
      together: number of models that were trained together, itself included.

    Returns:
      The record that is stored with the model.

    Raises:
      UserError: training stopped because a value was not finite.
    """
    plan, options = self.prepared.plan, self.prepared.config.method
    stage = plan.stages[name]
    if stage.train and outcome.stop != Stop.NONE:
      raise UserError(
        f"{name}: {describe_stop(outcome, options)}; lower "
        "config.train.optimizer.learning_rate or set config.train.clip_norm"
      )
    record = {
      "steps": outcome.steps,
      "stop": outcome.stop.name.lower(),
      "stop_reason": describe_stop(outcome, options),
      "seconds": outcome.seconds,
      "timing": outcome.timing,
      "together": together,
      "parent": None if stage.train else plan.keys["pretrain"],
      "work": self.prepared.task.work(self.loop.feed, stage, outcome.steps),
    }
    self.cache.publish(name, plan.keys[name], record, outcome.variables)
    self.cache.publish("evaluate", self.evaluations.key(name), outcome.evaluation)
    return record

  def _produce(self, name: str, member: Callable[[], stage_lib.Member]) -> tuple[Tree, Record]:
    """The stage's model and record, from the cache or by a run of `member()`."""
    key = self.prepared.plan.keys[name]
    cached = self.cache.load(name, key, self.prepared.template)
    # Processes must agree, because another run may publish the stage between their looks.
    if hosts.agree(cached is None):
      (outcome,) = self.loop.run([member()], self.checkpoints(f"{name}-{key}"))
      return outcome.variables, self.publish(name, outcome)
    assert cached is not None
    _say_cached(self, name, cached[1])
    _restore_metrics(self, name, cached[1])
    return cached

  def original(self) -> tuple[Tree, Record]:
    """The model to unlearn from: the imported one if there is one, else the pretrained one."""
    if self.prepared.imported is not None:
      return self.prepared.imported, {"seconds": 0.0, "stop_reason": "imported"}
    return self._produce("pretrain", lambda: self.member("pretrain"))

  def retrained(self) -> tuple[Tree, Record]:
    """The reference model: the given one if there is one, else one that is trained without the forget set."""
    if self.prepared.retrained is not None:
      return self.prepared.retrained, {"seconds": 0.0, "stop_reason": "imported"}
    return self._produce("retrain", lambda: self.member("retrain"))

  def unlearned(self, original: Tree, mask: Tree | None) -> tuple[Tree, Record]:
    """The unlearned model."""
    return self._produce("unlearn", lambda: self._member("unlearn", original, self.frozen(original, mask)))

  def mask(self, original: Tree) -> tuple[Tree | None, Record | None]:
    """The saliency mask of `config.mask` and the record of the mask stage, None without them."""
    prepared = self.prepared
    config, task = prepared.config.mask, prepared.task
    if not prepared.makes_mask:
      return prepared.given_mask, None
    forget = prepared.split.forget
    plan = data_lib.unlearning_plan(
      prepared.split,
      "forget",
      batch_size=min(config.batch_size, len(forget)),
      seed=prepared.config.seed,
      epoch="pass",
    )

    def gradient():
      # Via the host, because a model on several devices would move the computation to all of them.
      return self._watch.run(
        lambda: masks.forget_gradient(
          task.forward("sequential"),
          task.fetch("none"),
          self.loop.feed,
          plan,
          placement.place(jax.device_get(original), None),
          base=task.base(None),
          microbatch=task.microbatch(False),
        )
      )

    return masks.cached_mask(
      config,
      prepared.template["params"],
      gradient,
      cache=self.cache,
      key=prepared.plan.keys["mask"],
      provenance={
        "parent": prepared.plan.keys["pretrain"],
        "data": task.request.fingerprint,
        "forget_rows": len(forget),
      },
    )

  def estimate_memorization(self) -> memorization.Estimate:
    """Estimates the memorization scores of the available examples, and writes them to a file."""
    prepared = self.prepared
    request = prepared.task.request
    estimate = memorization.estimate(
      prepared.config.memorization,
      request.available,
      stage_plan.model_inputs(prepared.config, prepared.task),
      seed=prepared.config.seed,
      init=prepared.task.init,
      # The models share one device and are evaluated once, when their training has ended.
      loop=self._make_loop("sequential", None),
      evaluator=prepared.task.training_evaluator(prepared.evaluation_mesh),
      cache=self.cache,
      rundir=self.rundir,
    )
    if hosts.is_writer():
      rundir_lib.write_arrays(
        self._workdir / "memorization.npz", memorization=estimate.scores, rows=request.original_indices
      )
    return estimate


def _say_cached(stages: Stages, name: str, record: Record) -> None:
  if hosts.is_writer():
    seconds = progress.clock_text(record["seconds"])
    print(
      f"{name}: from the cache ({record['steps']} steps, which took {seconds})", file=sys.stderr, flush=True
    )
    every, folder = stages.prepared.plan.stages[name].keep_every, stages.rundir.path / loop_lib.KEPT
    if 0 < every <= record["steps"] and not folder.exists():
      print(
        f"note: config.keep_every={every}: unlearning comes from the cache, so no model is kept; to keep "
        "some, choose another --workdir, with a config.stage_cache of its own",
        file=sys.stderr,
        flush=True,
      )


def _restore_metrics(stages: Stages, name: str, record: Record) -> None:
  """Restores the metrics of a cached stage that has run in this directory, if they are lost."""
  if not stages.checkpoints(f"{name}-{stages.prepared.plan.keys[name]}").exists():
    return
  evaluation = stages.cache.outcome("evaluate", stages.evaluations.key(name)) or {}
  steps = record["steps"]
  stages.rundir.restore(name, steps, last={}, evaluation=evaluation, evaluated=steps)
