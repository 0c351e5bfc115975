"""One experiment: every stage from the data to the evaluated models, from the cache where it is there.

Memorization scores (where the forget set needs an estimate of them), pretraining, retraining, saliency
masks (where the method has one), unlearning, evaluation.
"""

import functools
import importlib.metadata
import pathlib
import platform
from typing import Any, NamedTuple

import jax
import ml_collections
from clu import parameter_overview

import hamu_jax
from hamu_jax import data as data_lib
from hamu_jax.config import default as config_lib
from hamu_jax.engine import loop as loop_lib
from hamu_jax.engine import methods, objectives, placement
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine import step as step_lib
from hamu_jax.errors import UserError
from hamu_jax.experiment import memorization, saliency, stage_plan
from hamu_jax.language import task as language
from hamu_jax.metrics import tow
from hamu_jax.report import run_plots
from hamu_jax.run import hosts, preemption, progress, tables
from hamu_jax.run import rundir as rundir_lib
from hamu_jax.run import stage_cache as stages_lib
from hamu_jax.transforms.alignment import tensor_names
from hamu_jax.transforms.stop import Stop
from hamu_jax.vision import evaluation
from hamu_jax.vision import request as request_lib
from hamu_jax.vision import task as vision

Tree = Any


def describe_stop(outcome: loop_lib.Outcome, options: ml_collections.ConfigDict) -> str:
  """One sentence on why a stage ended.

  Args:
    outcome: of the stage.
    options: `config.method`.
  """
  last = outcome.last_metrics
  after = f"after {outcome.steps} applied steps"
  match outcome.stop:
    case Stop.NONE:
      return f"finished {after}"
    case Stop.INFEASIBLE:
      rate, most = float(last["learning_rate"]), float(last["feasible_ratio"])
      field, asked, unit = "constraint_ratio", options.constraint_ratio, " times the learning rate"
      if options.constraint is not None:
        field, asked, most, unit = "constraint", options.constraint, most * rate, ""
      return (
        f"infeasible {after}: the constraint asks for {asked:.4g}{unit}, but the radius allows at most "
        f"{most:.4g} in every block; lower config.method.{field} to that, or set "
        "config.method.on_infeasible=project"
      )
    case Stop.CRITERION:
      return f"stopping criterion met {after}: margin {float(last['stopping_margin']):.4g} > 0"
    case Stop.RETAIN_LOSS:
      return f"retain loss {float(last['retain_loss']):.4g} above its threshold {after}"
    case Stop.FORGET_LOSS:
      return f"forget loss {float(last['forget_loss']):.4g} below its threshold {after}"
  return f"a loss, gradient or update was not finite {after}; the last good model is kept"


class Start(NamedTuple):
  """What unlearning starts from.

  Attributes:
    stage: the unlearning stage.
    loop: what runs it.
    original: variables of the model to unlearn from.
    frozen: what the stage's steps read beside the data and the base.
  """

  stage: loop_lib.Stage
  loop: loop_lib.Loop
  original: Tree
  frozen: step_lib.Frozen


class Experiment:
  """Data, model and cache of one configuration; `run` does the work.

  Attributes:
    loop: what runs the stages, None before `prepare`.

  Args:
    config: validated configuration.
    workdir: run directory.
    watch: notices signals.
    record: whether it takes possession of the run directory and logs there; without, stages are
      still looked up and left where they would be.
    like: an experiment that differs from this one in hyperparameters and seeds alone, see
      `together.group_key`; data, model and programs are shared with it.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    watch: preemption.Watch,
    *,
    record: bool = True,
    like: "Experiment | None" = None,
  ):
    self._workdir, self._watch, self._like = workdir, watch, like
    self.loop, self._records = None, {}
    self._config = config
    self._method = methods.METHODS[config.method.name]
    self._cache = stages_lib.StageCache(pathlib.Path(config.stage_cache or workdir / "stages"))
    if like is None:
      self._task = (language.Language if config_lib.is_language(config) else vision.Vision)(config)
    else:
      self._task = like._task.with_config(config)
    self._request = self._task.request
    self._devices = self._choose_devices()
    if self._request.estimates_scores:
      self._check_ensemble()
    self._template = self._task.template
    self._init = jax.jit(self._task.init) if like is None else like._init
    self._scores = self._request.read_scores()
    self._split = self._request.split(self._scores)
    self._plan = self._make_plan()
    self._imported = self._import_weights() if like is None else like._imported
    self._given_mask = self._read_mask()
    # Opened only now: an experiment that cannot run should not take possession of the workdir.
    self._rundir = (
      rundir_lib.RunDir.open(
        workdir, config.to_dict(), ignore=config_lib.INCIDENTAL, writer=hosts.is_writer()
      )
      if record
      else rundir_lib.RunDir(workdir, writer=False)
    )

  def _check_ensemble(self) -> None:
    """Raises a UserError unless an ensemble can be trained here and would give scores."""
    if jax.process_count() > 1:
      raise UserError(
        f"config.data.scores={config_lib.ESTIMATE!r}: an ensemble is trained by one process; estimate the "
        "scores in a run of its own and give its memorization.npz"
      )
    memorization.subsets(self._config.memorization, len(self._request.available), self._config.seed)

  def _choose_devices(self) -> tuple[jax.Device, ...]:
    """All devices for `pmap`, or as many as asked for; one for the other pairings."""
    devices = jax.devices()
    several = jax.process_count() > 1
    if several and (self._config.pairing != "pmap" or self._config.devices not in (0, len(devices))):
      raise UserError(
        f"config.pairing={self._config.pairing!r}, config.devices={self._config.devices}: several "
        "processes work together only with pairing 'pmap' on all their devices; set devices to 0"
      )
    chosen = pairing_lib.choose_devices(devices, self._config.pairing, self._config.devices)
    if self._config.pairing == "pmap":
      # Whether they can be shared out is known before anything is loaded.
      pairing_lib.make_mesh(chosen, self._method.device_groups, self._config.mesh.weights)
    return chosen

  def _make_plan(self) -> stage_plan.Plan:
    return stage_plan.make_plan(self._config, self._task, self._split, devices=len(self._devices))

  def _import_weights(self) -> Tree | None:
    """The trained weights to unlearn from, None without any."""
    path = self._config.model.weights
    return self._task.read_weights(path) if path else None

  def _read_mask(self) -> Tree | None:
    """The mask in a file, None without one."""
    saliency.check_fractions(self._config.mask, self._template["params"])
    path = self._config.mask.path
    return saliency.read_mask(path, self._template["params"]) if path else None

  def _make_loop(self, pairing: str, evaluate) -> loop_lib.Loop:
    """The loop over this experiment's model and data."""
    return loop_lib.Loop(
      forward=self._task.forward(pairing),
      fetch=self._task.fetch,
      feed=self._task.feed(self._split),
      evaluate=evaluate,
      pairing=pairing,
      devices=self._devices,
      progress=functools.partial(progress.Progress, enabled=hosts.is_writer()),
      watch=self._watch,
      checkpoint_seconds=self._config.checkpoint_seconds,
      base=self._task.base,
      weights=self._config.mesh.weights,
    )

  @property
  def _evaluation_mesh(self) -> jax.sharding.Mesh | None:
    """The devices that share an evaluation, None for the default one."""
    if self._config.pairing != "pmap":
      return None
    return pairing_lib.make_mesh(self._devices, 1, self._config.mesh.weights)

  def checkpoints(self, key: str) -> pathlib.Path:
    """The folder of a stage's checkpoints."""
    return self._workdir / "checkpoints" / key

  def keys(self) -> dict[str, str]:
    """The keys of the stages that train, by name, in order; not of one whose model is imported."""
    imported = {"pretrain"} if self._imported is not None else set()
    unused = set() if self._config.retrain or self._method.from_scratch else {"retrain"}
    return {name: self._plan.keys[name] for name in self._plan.stages if name not in imported | unused}

  def lacks(self, name: str) -> bool:
    """Whether a stage is not in the cache."""
    # Agreed on: another run may have published between the looks of two processes.
    return bool(hosts.agree(self._cache.outcome(name, self._plan.keys[name]) is None))

  def member(self, name: str) -> loop_lib.Member:
    """What the loop runs of a stage; those before it are run, or taken from the cache, first."""
    if name != "unlearn":
      return self._member(name, self._initial(), step_lib.Frozen())
    original, _ = self._original()
    mask, _ = self._mask(original)
    return self._member(name, original, self._frozen(original, mask))

  def _member(self, name: str, start: Tree, frozen: step_lib.Frozen) -> loop_lib.Member:
    return loop_lib.Member(self._plan.stages[name], start, frozen, self._rundir)

  def publish(self, name: str, outcome: loop_lib.Outcome, *, together: int = 1) -> dict[str, Any]:
    """Adds a stage's model and evaluation to the cache.

    Args:
      name: of the stage.
      outcome: of the loop.
      together: how many models were trained with it, itself included.

    Returns:
      The record beside the model.

    Raises:
      UserError: training has stopped, as something was not finite.
    """
    stage, key = self._plan.stages[name], self._plan.keys[name]
    if stage.train and outcome.stop != Stop.NONE:
      raise UserError(
        f"{name}: {describe_stop(outcome, self._config.method)}; lower "
        "config.train.optimizer.learning_rate or set config.train.clip_norm"
      )
    record = {
      "steps": outcome.steps,
      "stop": outcome.stop.name.lower(),
      "stop_reason": describe_stop(outcome, self._config.method),
      "seconds": outcome.seconds,
      "together": together,
      "parent": None if stage.train else self._plan.keys["pretrain"],
      "work": self._task.work(self.loop.feed, stage, outcome.steps),
    }
    self._cache.publish(name, key, record, outcome.variables)
    self._cache.publish("evaluate", self._evaluation_key(name), outcome.evaluation)
    return record

  def _produce(self, name: str, member):
    """The stage's model and outcome, from the cache or by running `member()`."""
    key = self._plan.keys[name]
    if self.lacks(name):
      (outcome,) = self.loop.run([member()], self.checkpoints(f"{name}-{key}"))
      return outcome.variables, self.publish(name, outcome)
    return self._cache.model(name, key, self._template), self._cache.outcome(name, key)

  def _evaluation_key(self, name: str) -> str:
    """Key of the evaluation of a stage's model."""
    return stages_lib.fingerprint(
      {
        "of": self._plan.keys[name],
        **self._task.evaluation_inputs,
        "options": {
          option: self._config.evaluate[option] for option in ("batch_size", "batch_tokens", "min_k_fraction")
        },
        "splits": {split: examples.indices.tolist() for split, examples in self._evaluator.splits.items()},
      }
    )

  def _evaluate(self, name: str, variables: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """A stage's final model: values of all splits and, by kind of evaluation, those of examples."""
    key = self._evaluation_key(name)
    placed = placement.place(variables, self._evaluation_mesh)

    def cached(kind, key, compute):
      record = self._cache.outcome(kind, key)
      if hosts.agree(record is None):
        record = self._watch.run(lambda: compute(placed))
        self._cache.publish(kind, key, record)
      return record

    results, examples = cached("evaluate", key, self._evaluator.summary), {}
    for kind, (depends_on, compute) in self._task.extras(self._evaluator).items():
      record = cached(
        kind,
        stages_lib.fingerprint({"of": key, **depends_on}),
        lambda placed, compute=compute: rundir_lib.jsonable(
          dict(zip(("values", "examples"), compute(placed), strict=True))
        ),
      )
      if record["values"]:
        results[kind] = record["values"]
      if record["examples"]:
        examples[kind] = record["examples"]
    return results, examples

  def _original(self):
    """The model to unlearn from: imported if there is one, else pretrained."""
    if self._imported is not None:
      return self._imported, {"seconds": 0.0, "stop_reason": "imported"}
    return self._produce("pretrain", lambda: self.member("pretrain"))

  def _initial(self) -> Tree:
    """The untrained model, the same for pretraining and retraining."""
    return self._watch.run(lambda: self._init(self._config.seed))

  def estimate_memorization(self) -> memorization.Estimate:
    """Memorization scores of the examples that may be learnt, by an ensemble; leaves them in a file."""
    train = self._request.dataset.train
    evaluator = self._task.evaluator_of(
      self._evaluation_mesh,
      {"train": evaluation.Examples(train.images, train.labels, self._request.available)},
    )
    estimate = memorization.estimate(
      self._config.memorization,
      self._request.available,
      stage_plan.model_inputs(self._config, self._task),
      seed=self._config.seed,
      init=self._task.init,
      # Its models share one device, and are evaluated when they are done.
      loop=self._make_loop("sequential", None),
      evaluator=evaluator,
      cache=self._cache,
      rundir=self._rundir,
    )
    if hosts.is_writer():
      rundir_lib.write_arrays(
        self._workdir / "memorization.npz",
        memorization=estimate.scores,
        rows=self._request.original_indices,
      )
    return estimate

  def _mask(self, original: Tree):
    """The saliency mask of `config.mask`, None without one, and what the mask stage recorded."""
    config = self._config.mask
    if self._given_mask is not None or not config.fraction:
      return self._given_mask, None
    plan = data_lib.unlearning_plan(
      self._split,
      "forget",
      batch_size=min(config.batch_size, len(self._split.forget)),
      seed=self._config.seed,
      epoch="pass",
    )

    def gradient():
      # By way of the host: a model fresh from several devices would take them all along.
      return self._watch.run(
        lambda: saliency.forget_gradient(
          self._task.forward("sequential"),
          self._task.fetch("none"),
          self.loop.feed,
          plan,
          placement.place(jax.device_get(original), None),
          base=self._task.base(None),
          microbatch=self._task.microbatch(False),
        )
      )

    return saliency.cached_mask(
      config,
      self._template["params"],
      gradient,
      cache=self._cache,
      key=self._plan.keys["mask"],
      provenance={
        "parent": self._plan.keys["pretrain"],
        "data": self._request.fingerprint,
        "forget_rows": len(self._split.forget),
      },
    )

  def run(self) -> dict[str, Any]:
    """Runs all stages, writes the summary, the plots and the models, prints the table.

    Returns:
      The content of summary.json.

    Raises:
      UserError: something in the configuration or the data is wrong.
      preemption.Preempted: the run was asked to end; what it did is saved.
    """
    overview = parameter_overview.get_parameter_overview(self._template["params"], include_stats=False)
    if hosts.is_writer():
      rundir_lib.write_bytes(self._workdir / "parameters.txt", f"{overview}\n".encode())
    try:
      return self._run()
    finally:
      self.close()

  def close(self) -> None:
    """Closes the run directory."""
    self._rundir.close()

  def start(self) -> Start:
    """Runs the stages before unlearning, or takes them from the cache, and stops there.

    The method must not train from scratch.

    Raises:
      UserError: as `run`.
      preemption.Preempted: as `run`.
    """
    self.prepare()
    original, _ = self._original()
    mask, _ = self._mask(original)
    return Start(self._plan.stages["unlearn"], self.loop, original, self._frozen(original, mask))

  def _frozen(self, original: Tree, mask: Tree | None) -> step_lib.Frozen:
    """What unlearning reads beside the data and the base."""
    needed = methods.needs_reference(self._method, objectives.TERMS)
    return step_lib.Frozen(original if needed else None, mask)

  def prepare(self) -> None:
    """Makes the loop and the evaluator, once; an ensemble whose scores choose the forget set comes first."""
    if self.loop is not None:
      return
    if self._request.estimates_scores:
      estimate = self.estimate_memorization()
      self._records["memorization"] = {"seconds": estimate.seconds}
      self._scores = estimate.scores
      self._split = self._request.split(self._scores)
      self._plan = self._make_plan()
    if self._like is None:
      self._evaluator = self._task.evaluator(self._split, self._scores, self._evaluation_mesh)
      self.loop = self._make_loop(self._config.pairing, self._evaluator.summary)
    else:
      self._evaluator = self._like._evaluator
      self.loop = self._like.loop

  def _run(self) -> dict[str, Any]:
    """`run`, inside the open run directory."""
    self.prepare()
    records = self._records
    original, records["pretrain"] = self._original()
    trained, mask = {"original": original}, None
    if self._config.retrain or self._method.from_scratch:
      trained["retrained"], records["retrain"] = self._produce("retrain", lambda: self.member("retrain"))
    if self._method.from_scratch:
      trained["unlearned"] = trained["retrained"]
    else:
      mask, mask_record = self._mask(original)
      records |= {"mask": mask_record} if mask_record else {}
      trained["unlearned"], records["unlearn"] = self._produce(
        "unlearn", lambda: self._member("unlearn", original, self._frozen(original, mask))
      )
    final = records[self._plan.final]
    results, examples = self._results(trained)
    summary = {
      "method": self._config.method.name,
      "results": results,
      "steps": final["steps"],
      "stop_reason": final["stop_reason"],
      "seconds": {name: record["seconds"] for name, record in records.items()},
      "provenance": self._provenance(records),
    }
    work = {
      name: record["work"] | {"tokens_per_second": record["work"]["tokens"] / record["seconds"]}
      for name, record in records.items()
      if record.get("work")
    }
    if work:
      summary["work"] = work
    if hosts.is_writer():
      self._leave_results(summary, trained, mask, examples)
    return summary

  def _results(self, trained: dict[str, Tree]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluation of each model, with what compares it with the retrained one where there is one."""
    stages = {"original": "pretrain", "retrained": "retrain", "unlearned": self._plan.final}
    results, examples = {}, {}
    for name, model in trained.items():
      results[name], examples[name] = self._evaluate(stages[name], model)
    self._task.compare(results, examples)
    splits = ("retain", "forget", "test")
    if "retrained" not in results or not set(splits) <= set(results["retrained"]):
      return results, examples
    accuracies = {
      name: {split: result[split]["accuracy"] for split in splits} for name, result in results.items()
    }
    for name in ("original", "unlearned"):
      for suffix, signed in (("", False), ("_signed", True)):
        results[name][f"tug_of_war{suffix}"] = tow.tug_of_war(
          accuracies[name], accuracies["retrained"], signed=signed
        )
    return results, examples

  def _provenance(self, records) -> dict[str, Any]:
    """What the results come from; `records` names the stages that there are."""
    versions = {
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    }
    return {
      "versions": versions | {"hamu-jax": hamu_jax.__version__, "python": platform.python_version()},
      "device": self._devices[0].device_kind,
      "devices": len(self._devices),
      "processes": jax.process_count(),
      "data_fingerprint": self._request.fingerprint,
      **self._task.provenance,
      "config_fingerprint": stages_lib.fingerprint(self._config.to_dict()),
      "scores_fingerprint": request_lib.scores_fingerprint(self._scores),
      "stages": {name: key for name, key in self._plan.keys.items() if name in records},
      # How many models shared a stage's program, and so its seconds.
      "together": {
        name: record["together"] for name, record in records.items() if record.get("together", 1) > 1
      },
      "parent_checkpoint": self._config.model.weights
      or str(self._cache.folder("pretrain", self._plan.keys["pretrain"])),
    }

  def _leave_results(
    self,
    summary: dict[str, Any],
    trained: dict[str, Tree],
    mask: Tree | None,
    examples: dict[str, Any],
  ) -> None:
    """Writes what a person takes away from the run directory, the summary last."""
    for name, model in trained.items():
      self._task.save(self._workdir, name, model)
      if examples[name]:
        (self._workdir / "examples").mkdir(exist_ok=True)
      for kind, splits in examples[name].items():
        rundir_lib.write_json(self._workdir / "examples" / f"{name}-{kind}.json", splits)
    if mask is not None:
      self._task.save(self._workdir, "mask", {"params": mask})
    rundir_lib.write_arrays(
      self._workdir / "split.npz", validation=self._request.validation, **self._split._asdict()
    )
    rows = rundir_lib.read_metrics(self._workdir).rows
    run_plots.tradeoff(
      rows, self._workdir / "tradeoff.png", references=summary["results"], title=summary["method"]
    )
    run_plots.alignment(
      rows,
      self._workdir / "alignment.png",
      title=summary["method"],
      names=tensor_names(self._template["params"]),
    )
    self._rundir.write_json("summary.json", summary)
    for split, count in summary["provenance"].get("cut", {}).items():
      print(f"{split}: {count} examples were cut to config.text.max_length tokens")
    print(tables.results_table(summary))
    print(f"{summary['method']}: {summary['stop_reason']}; everything is in {self._workdir}")
