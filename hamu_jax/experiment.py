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

import hamu_jax
from hamu_jax import config as config_lib
from hamu_jax import data as data_lib
from hamu_jax import evaluation
from hamu_jax import hosts
from hamu_jax import loop as loop_lib
from hamu_jax import methods
from hamu_jax import models
from hamu_jax import objectives
from hamu_jax import pairing as pairing_lib
from hamu_jax import preemption
from hamu_jax import progress
from hamu_jax import rundir as rundir_lib
from hamu_jax import stages as stages_lib
from hamu_jax.analysis import alignment
from hamu_jax.analysis import plots
from hamu_jax.errors import UserError
from hamu_jax.metrics import tow
from hamu_jax.paired import Paired
from hamu_jax.transforms.stop import Stop

Tree = Any
# The names of the three models in the results.
_RESULT_NAMES = {"pretrain": "original", "retrain": "retrained", "unlearn": "unlearned"}


def make_forward(model, mean, std, axis_name: str | None):
  """(variables, batch, key, train) -> (logits [B, C], batch_stats) of an image model.

  Args:
    model: linen module.
    mean: of each channel, in [0, 1].
    std: of each channel.
    axis_name: mesh axis over which training-mode batch norm shares its statistics.
  """

  def forward(variables, batch, key, train):
    del key  # These models draw no random numbers.
    dtype = jax.tree.leaves(variables["params"])[0].dtype
    images = data_lib.normalize(batch["image"], mean, std, dtype)
    if not train:
      return model.apply(variables, images, train=False), variables["batch_stats"]
    logits, updated = model.apply(
        variables, images, train=True, mask=batch["mask"], axis_name=axis_name,
        mutable=["batch_stats"],
    )
    return logits, updated["batch_stats"]

  return forward


def make_fetch(augment: str):
  """(data, rows [B], key) -> batch, gathered on the device and augmented."""

  def fetch(data, rows, key):
    batch = data_lib.take(*data, rows)
    keys = data_lib.example_keys(key, batch["row"])
    return batch | {"image": data_lib.augment(batch["image"], keys, augment)}

  return fetch


def evaluation_splits(dataset: data_lib.Dataset, split: Paired, classes) -> dict[str, tuple]:
  """Images and labels of every split that is evaluated.

  Where the forget set is made of whole classes the test set is also shown in two parts: `test_forget`,
  the forgotten classes, and `test_retain`, all others.
  """
  train, test = dataset.train, dataset.test
  splits = {
      "retain": (train.images[split.retain], train.labels[split.retain]),
      "forget": (train.images[split.forget], train.labels[split.forget]),
      "test": (test.images, test.labels),
  }
  if classes:
    forgotten = np.isin(test.labels, classes)
    if 0 < forgotten.sum() < forgotten.size:
      splits["test_retain"] = (test.images[~forgotten], test.labels[~forgotten])
      splits["test_forget"] = (test.images[forgotten], test.labels[forgotten])
  return splits


def describe_stop(outcome: loop_lib.Outcome) -> str:
  """One sentence on why a stage ended."""
  last = outcome.last_metrics
  after = f"after {outcome.steps} applied steps"
  match outcome.stop:
    case Stop.NONE:
      return f"finished {after}"
    case Stop.INFEASIBLE:
      rate = float(last["learning_rate"])
      asked = float(np.sum(last["stopping_constraint"])) / rate if rate else float("nan")
      return (
          f"infeasible {after}: the constraint asks for {asked:.4g} times the learning rate, but the "
          f"radius allows at most {float(last['feasible_ratio']):.4g} in every block; lower "
          "config.method.constraint_ratio to that, or set config.method.on_infeasible=project"
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
    self._config = config
    self._workdir = workdir
    self._watch = watch
    self._method = methods.METHODS[config.method.name]
    self._devices = self._choose_devices()
    self._cache = stages_lib.StageCache(
        pathlib.Path(config.stage_cache) if config.stage_cache else workdir / "stages"
    )
    options = config.data
    self._dataset = data_lib.load(
        options.source, name=options.name, path=options.path, train_size=options.train_size,
        test_size=options.test_size, image_key=options.image_key, label_key=options.label_key,
        seed=options.seed,
    )
    self._split = data_lib.make_split(
        options.forget, self._dataset.train.labels, seed=options.seed,
        forget_class=options.forget_class, hard_probability=options.hard_probability,
        forget_fraction=options.forget_fraction, forget_indices=options.forget_indices,
        duplicates=options.duplicates,
    )
    self._check_channels()
    self._model = models.build_model(config.model.name, num_classes=len(self._dataset.class_names))
    self._template = jax.eval_shape(self._init)
    # Opened only now: an experiment whose data is wrong should not take possession of the workdir.
    self._rundir = rundir_lib.RunDir.open(
        workdir, config.to_dict(), ignore=config_lib.INCIDENTAL, writer=hosts.is_writer()
    )
    self._loop = self._make_loop(watch)
    self._keys = self._fingerprints()

  def _check_channels(self) -> None:
    channels = self._dataset.train.images.shape[-1]
    if len(self._config.data.mean) != channels:
      raise UserError(
          f"config.data.mean={tuple(self._config.data.mean)}: the images have {channels} channel(s); give "
          "config.data.mean and config.data.std one value for each"
      )

  def _choose_devices(self):
    devices = jax.devices()
    wanted = self._config.devices or len(devices)
    if self._config.pairing == "pmap":
      if wanted > len(devices):
        raise UserError(
            f"config.devices={wanted}: this machine has {len(devices)}; lower it, or 0 for all"
        )
      pairing_lib.make_mesh(devices[:wanted], len(self._method.roles))
    return tuple(devices[:wanted])

  def _init(self):
    image = jnp.zeros((1, *self._dataset.train.images.shape[1:]))
    variables = self._model.init(jax.random.key(self._config.seed), image, train=False)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

  def _make_loop(self, watch) -> loop_lib.Loop:
    config = self._config
    pmap = config.pairing == "pmap"
    forward = make_forward(
        self._model, config.data.mean, config.data.std, pairing_lib.DATA_AXIS if pmap else None
    )
    classes = config.data.forget_class if config.data.forget == "class" else ()
    evaluator = evaluation.Evaluator(
        forward,
        evaluation_splits(self._dataset, self._split, classes),
        config.evaluate.batch_size,
        pairing_lib.make_mesh(self._devices, 1) if pmap else None,
    )
    return loop_lib.Loop(
        forward=forward,
        fetch=make_fetch,
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
        "model": config.model.to_dict(),
        "seed": config.seed,
        # Training too depends on the split: it selects its best epoch by retain and forget accuracy.
        "split": {role: rows.tolist() for role, rows in self._split._asdict().items()},
        "train": config.train.to_dict(),
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

  def _training_stage(self, name: str, rows: np.ndarray) -> loop_lib.Stage:
    options = self._config.train
    plan = data_lib.training_plan(
        rows, batch_size=options.batch_size, seed=self._config.seed,
        reshuffle=options.shuffle == "each_epoch",
    )
    return loop_lib.Stage(
        name, methods.TRAINING, options, plan, plan.num_steps(options.epochs), True,
        self._config.seed,
    )

  def _unlearning_stage(self) -> loop_lib.Stage:
    options, roles = self._config.method, self._method.roles
    plan = data_lib.unlearning_plan(
        self._split, "paired" if len(roles) == 2 else roles[0], batch_size=options.batch_size,
        seed=self._config.seed, repeats=options.repeats,
    )
    steps = plan.num_steps(options.epochs)
    return loop_lib.Stage(
        "unlearn", self._method, options, plan, min(steps, options.max_steps or steps), False,
        self._config.seed,
    )

  def _produce(self, stage: loop_lib.Stage, variables: Tree, reference: Tree):
    """The stage's model and outcome, from the cache or by running it."""
    key = self._keys[stage.name]
    record = self._cache.outcome(stage.name, key)
    if record is None:
      outcome = self._loop.run(
          stage, variables, reference, self._workdir / "checkpoints" / stage.name
      )
      record = {
          "steps": outcome.steps,
          "stop": outcome.stop.name.lower(),
          "stop_reason": describe_stop(outcome),
          "seconds": outcome.seconds,
          "parent": None if stage.train else self._keys["pretrain"],
      }
      self._cache.publish(stage.name, key, record, outcome.variables)
      return outcome.variables, record
    return self._cache.model(stage.name, key, self._template), record

  def _evaluate(self, name: str, variables: Tree) -> dict[str, Any]:
    """All splits of a stage's final model, from the cache or by evaluating it."""
    key = stages_lib.fingerprint({"of": self._keys[name], "batch": self._config.evaluate.to_dict()})
    record = self._cache.outcome("evaluate", key)
    if record is None:
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
    stage = self._training_stage("pretrain", np.concatenate(self._split))
    return self._produce(stage, self._initial(), None)

  def _initial(self) -> Tree:
    return jax.jit(self._init)()

  def run(self) -> dict[str, Any]:
    """Runs all stages, writes the summary, the plots and the unlearned weights, prints the table.

    Returns:
      The content of summary.json.

    Raises:
      UserError: something in the configuration or the data is wrong.
      preemption.Preempted: the run was asked to end; what it did is saved.
    """
    try:
      return self._run()
    finally:
      self._rundir.close()

  def _run(self) -> dict[str, Any]:
    # Planned first: a batch that does not fit its set should not cost a pretraining.
    unlearning = self._unlearning_stage()
    original, record = self._original()
    records, variables = {"pretrain": record}, {"pretrain": original}
    if self._config.retrain:
      stage = self._training_stage("retrain", self._split.retain)
      variables["retrain"], records["retrain"] = self._produce(stage, self._initial(), None)
    reference = original if methods.needs_reference(self._method, objectives.TERMS) else None
    variables["unlearn"], records["unlearn"] = self._produce(unlearning, original, reference)

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
