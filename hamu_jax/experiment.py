"""One experiment: pretrain, retrain, unlearn, evaluate, each taken from the cache where it is there."""

import functools
import importlib.metadata
import pathlib
import platform
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from clu import parameter_overview

import hamu_jax
from hamu_jax import config as config_lib
from hamu_jax import data as data_lib
from hamu_jax import evaluation, hosts, methods, models, objectives, preemption, progress, vision
from hamu_jax import loop as loop_lib
from hamu_jax import pairing as pairing_lib
from hamu_jax import rundir as rundir_lib
from hamu_jax import stages as stages_lib
from hamu_jax.analysis import alignment, plots
from hamu_jax.errors import UserError
from hamu_jax.metrics import tow
from hamu_jax.models import weights
from hamu_jax.transforms.stop import Stop

Tree = Any
# The names of the three models in the results.
_RESULT_NAMES = {"pretrain": "original", "retrain": "retrained", "unlearn": "unlearned"}


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


class Experiment:
  """Data, model and cache of one configuration; `run` does the work.

  Args:
    config: validated configuration.
    workdir: run directory.
    watch: notices signals.
  """

  def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path,
               watch: preemption.Watch):
    self._config = config = config.copy_and_resolve_references()
    self._workdir = workdir
    self._watch = watch
    self._method = methods.METHODS[config.method.name]
    self._devices = self._choose_devices()
    self._cache = stages_lib.StageCache(
        pathlib.Path(config.stage_cache) if config.stage_cache else workdir / "stages"
    )
    options = config.data
    self._dataset = watch.run(lambda: data_lib.load(
        options.source, name=options.name, path=options.path, train_size=options.train_size,
        test_size=options.test_size, image_key=options.image_key, label_key=options.label_key,
        seed=options.seed,
    ))
    self._split = data_lib.make_split(
        options.forget, self._dataset.train.labels, seed=options.seed,
        forget_class=options.forget_class, hard_probability=options.hard_probability,
        forget_fraction=options.forget_fraction, forget_indices=options.forget_indices,
        duplicates=options.duplicates,
    )
    self._check_channels()
    declared = config.to_dict()
    config.method.microbatch = config.method.microbatch or models.microbatch_size(
        *self._dataset.train.images.shape[1:3]
    )
    self._model = models.build_model(config.model.name, num_classes=len(self._dataset.class_names))
    self._template = jax.eval_shape(self._init)
    self._stages = self._plan()
    self._keys = self._fingerprints()
    # Opened only now: an experiment that cannot run should not take possession of the workdir.
    self._rundir = rundir_lib.RunDir.open(
        workdir, declared, ignore=config_lib.INCIDENTAL, writer=hosts.is_writer()
    )
    self._loop = self._make_loop(watch)

  def _check_channels(self) -> None:
    """Raises a UserError unless there is a mean for every channel."""
    channels = self._dataset.train.images.shape[-1]
    if len(self._config.data.mean) != channels:
      raise UserError(
          f"config.data.mean={tuple(self._config.data.mean)}: the images have {channels} channel(s); give "
          "config.data.mean and config.data.std one value for each"
      )

  def _choose_devices(self) -> tuple[jax.Device, ...]:
    """All devices for `pmap`, or as many as asked for; one for the other pairings."""
    devices = jax.devices()
    several = jax.process_count() > 1
    if several and (self._config.pairing != "pmap" or self._config.devices not in (0, len(devices))):
      raise UserError(
          f"config.pairing={self._config.pairing!r}, config.devices={self._config.devices}: several "
          "processes work together only with pairing 'pmap' on all their devices; set devices to 0"
      )
    if self._config.pairing != "pmap":
      return tuple(devices[:1])
    wanted = self._config.devices or len(devices)
    if wanted > len(devices):
      raise UserError(f"config.devices={wanted}: there are {len(devices)}; lower it, or 0 for all")
    pairing_lib.make_mesh(devices[:wanted], len(self._method.roles))
    return tuple(devices[:wanted])

  def _init(self) -> Tree:
    """The model's variables, drawn with the run's seed."""
    image = jnp.zeros((1, *self._dataset.train.images.shape[1:]))
    variables = self._model.init(jax.random.key(self._config.seed), image, train=False)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

  def _make_loop(self, watch) -> loop_lib.Loop:
    """The loop over this experiment's model and data."""
    config = self._config
    pmap = config.pairing == "pmap"
    forward = vision.make_forward(
        self._model, config.data.mean, config.data.std, pairing_lib.DATA_AXIS if pmap else None
    )
    classes = config.data.forget_class if config.data.forget == "class" else ()
    evaluator = evaluation.Evaluator(
        forward,
        vision.evaluation_splits(self._dataset, self._split, classes),
        config.evaluate.batch_size,
        pairing_lib.make_mesh(self._devices, 1) if pmap else None,
    )
    return loop_lib.Loop(
        forward=forward,
        fetch=vision.make_fetch,
        data=tuple(self._dataset.train),
        evaluator=evaluator,
        pairing=config.pairing,
        devices=self._devices,
        rundir=self._rundir,
        progress=functools.partial(progress.Progress, enabled=hosts.is_writer()),
        watch=watch,
        checkpoint_seconds=config.checkpoint_seconds,
    )

  def _fingerprints(self) -> dict[str, str]:
    """Key of every stage: a hash of all that its result depends on."""
    config = self._config
    common = {
        "version": hamu_jax.__version__,
        "data": self._dataset.fingerprint,
        "normalization": [config.data.mean, config.data.std],
        "model": config.model.name,
        "seed": config.seed,
        # Training too depends on the split: it selects its best epoch by retain and forget accuracy.
        "split": {role: rows.tolist() for role, rows in self._split._asdict().items()},
        "train": config.train.to_dict(),
        # A file may change under its name.
        "weights": weights.fingerprint(config.model.weights) if config.model.weights else None,
    }
    keys = {
        "pretrain": stages_lib.fingerprint(common | {"rows": "all"}),
        "retrain": stages_lib.fingerprint(common | {"rows": "retain"}),
    }
    keys["unlearn"] = stages_lib.fingerprint(common | {
        "parent": keys["pretrain"],
        "method": config.method.to_dict(),
        "pairing": config.pairing,
        "devices": len(self._devices),
    })
    return keys

  def _plan(self) -> dict[str, loop_lib.Stage]:
    """All stages by name."""
    config, seed = self._config, self._config.seed

    def training(name, rows):
      plan = data_lib.training_plan(
          rows, batch_size=config.train.batch_size, seed=seed,
          reshuffle=config.train.shuffle == "each_epoch",
      )
      steps = plan.num_steps(config.train.epochs)
      return loop_lib.Stage(name, methods.TRAINING, config.train, plan, steps, True, seed)

    roles = self._method.roles
    plan = data_lib.unlearning_plan(
        self._split, "paired" if len(roles) == 2 else roles[0],
        batch_size=config.method.batch_size, seed=seed, repeats=config.method.repeats,
    )
    steps = plan.num_steps(config.method.epochs)
    steps = min(steps, config.method.max_steps or steps)
    stages = (
        training("pretrain", np.concatenate(self._split)),
        training("retrain", self._split.retain),
        loop_lib.Stage("unlearn", self._method, config.method, plan, steps, False, seed),
    )
    return {stage.name: stage for stage in stages}

  def _produce(self, name: str, start, reference: Tree = None):
    """The stage's model and outcome, from the cache or by running it from the model `start()`."""
    stage = self._stages[name]
    key = self._keys[name]
    record = self._cache.outcome(name, key)
    # Together: another run may have published between the looks of two processes.
    if hosts.agree(record is None):
      outcome = self._loop.run(
          stage, start(), reference, self._workdir / "checkpoints" / f"{name}-{key}"
      )
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
          "parent": None if stage.train else self._keys["pretrain"],
      }
      self._cache.publish(name, key, record, outcome.variables)
      self._cache.publish("evaluate", self._evaluation_key(name), outcome.evaluation)
      return outcome.variables, record
    return self._cache.model(name, key, self._template), record

  def _evaluation_key(self, name: str) -> str:
    """Key of the evaluation of a stage's model."""
    return stages_lib.fingerprint({
        "of": self._keys[name],
        "batch": self._config.evaluate.to_dict(),
        "splits": list(self._loop.evaluator.splits),
    })

  def _evaluate(self, name: str, variables: Tree) -> dict[str, Any]:
    """All splits of a stage's final model, from the cache or, of an imported one, by evaluating it."""
    key = self._evaluation_key(name)
    record = self._cache.outcome("evaluate", key)
    if hosts.agree(record is None):
      mesh = pairing_lib.make_mesh(self._devices, 1) if self._config.pairing == "pmap" else None
      placed = loop_lib.place(variables, mesh)
      record = self._watch.run(lambda: self._loop.evaluator.summary(placed))
      self._cache.publish("evaluate", key, record)
    return record

  def _original(self):
    """The model to unlearn from: imported if there is one, else pretrained."""
    if self._config.model.weights:
      variables = models.load_weights(self._config.model.weights, self._template)
      return variables, {"seconds": 0.0, "stop_reason": "imported"}
    return self._produce("pretrain", self._initial)

  def _initial(self) -> Tree:
    """The untrained model, the same for pretraining and retraining."""
    return self._watch.run(jax.jit(self._init))

  def run(self) -> dict[str, Any]:
    """Runs all stages, writes the summary, the plots and the unlearned weights, prints the table.

    Returns:
      The content of summary.json.

    Raises:
      UserError: something in the configuration or the data is wrong.
      preemption.Preempted: the run was asked to end; what it did is saved.
    """
    overview = parameter_overview.get_parameter_overview(
        self._template["params"], include_stats=False
    )
    if hosts.is_writer():
      rundir_lib.write_bytes(self._workdir / "parameters.txt", f"{overview}\n".encode())
    try:
      return self._run()
    finally:
      self._rundir.close()

  def _run(self) -> dict[str, Any]:
    """`run`, inside the open run directory."""
    original, record = self._original()
    records, variables = {"pretrain": record}, {"pretrain": original}
    if self._config.retrain:
      variables["retrain"], records["retrain"] = self._produce("retrain", self._initial)
    reference = original if methods.needs_reference(self._method, objectives.TERMS) else None
    variables["unlearn"], records["unlearn"] = self._produce(
        "unlearn", lambda: original, reference
    )

    summary = {
        "method": self._config.method.name,
        "results": self._results(variables),
        "steps": records["unlearn"]["steps"],
        "stop_reason": records["unlearn"]["stop_reason"],
        "seconds": {name: record["seconds"] for name, record in records.items()},
        "provenance": self._provenance(),
    }
    if hosts.is_writer():
      self._leave_results(summary, variables["unlearn"])
    return summary

  def _results(self, variables: dict[str, Tree]) -> dict[str, Any]:
    """Evaluation of each model, with the tug-of-war against the retrained one where there is one."""
    results = {
        _RESULT_NAMES[name]: self._evaluate(name, model) for name, model in variables.items()
    }
    if "retrained" not in results:
      return results
    accuracies = {
        name: {split: result[split]["accuracy"] for split in ("retain", "forget", "test")}
        for name, result in results.items()
    }
    for name in ("original", "unlearned"):
      results[name]["tug_of_war"] = tow.tug_of_war(accuracies[name], accuracies["retrained"])
    return results

  def _provenance(self) -> dict[str, Any]:
    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    }
    return {
        "versions": versions | {"hamu-jax": hamu_jax.__version__, "python": platform.python_version()},
        "device": self._devices[0].device_kind,
        "devices": len(self._devices),
        "processes": jax.process_count(),
        "data_fingerprint": self._dataset.fingerprint,
        "config_fingerprint": stages_lib.fingerprint(self._config.to_dict()),
        "stages": self._keys,
        "parent_checkpoint": self._config.model.weights
        or str(self._cache.folder("pretrain", self._keys["pretrain"])),
    }

  def _leave_results(self, summary: dict[str, Any], unlearned: Tree) -> None:
    """Writes what a person takes away from the run directory."""
    self._rundir.write_json("summary.json", summary)
    models.save_weights(self._workdir / "unlearned.safetensors", unlearned)
    rows = rundir_lib.read_metrics(self._workdir).rows
    plots.tradeoff(
        rows, self._workdir / "tradeoff.png", references=summary["results"], title=summary["method"]
    )
    plots.alignment(
        rows, self._workdir / "alignment.png", title=summary["method"],
        names=alignment.tensor_names(self._template["params"]),
    )
    print(progress.results_table(summary))
    print(f"{summary['method']}: {summary['stop_reason']}; everything is in {self._workdir}")
