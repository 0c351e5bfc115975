"""The results of an experiment: the summary, the models, the figures and the table."""

import importlib.metadata
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax

import hamu_jax
from hamu_jax.config import readers
from hamu_jax.experiment.evaluations import Record
from hamu_jax.experiment.preparation import Preparation
from hamu_jax.experiment.stages import Stages
from hamu_jax.metrics import tow
from hamu_jax.report import run_plots
from hamu_jax.run import progress, tables
from hamu_jax.run import rundir as rundir_lib
from hamu_jax.run.metrics_log import read_metrics
from hamu_jax.run.stage_cache import fingerprint
from hamu_jax.transforms.alignment import tensor_names
from hamu_jax.vision.request import scores_fingerprint

Tree = Any
_COMPARED = ("retain", "forget", "test")


def evaluate_models(stages: Stages, models: Mapping[str, Tree]) -> tuple[Record, Record]:
  """Evaluates each model and compares it with the retrained one, if there is one.

  Args:
    stages: stages of the experiment.
    models: variables by name; "original", "retrained" and "unlearned" are those of the stages, any other
      name has a key of its own in the plan.

  Returns:
    Results by model, as in `summary.json`, and values of single examples by model and kind.
  """
  prepared = stages.prepared
  made_by = {"original": "pretrain", "retrained": "retrain", "unlearned": prepared.plan.final}
  results, examples = {}, {}
  for name, model in models.items():
    results[name], examples[name] = stages.evaluations.evaluate(made_by.get(name, name), model, title=name)
  prepared.task.compare(results, examples)
  if "retrained" not in results or not set(_COMPARED) <= set(results["retrained"]):
    return results, examples
  accuracies = {
    name: {split: result[split]["accuracy"] for split in _COMPARED} for name, result in results.items()
  }
  for name in results.keys() - {"retrained"}:
    for suffix, signed in (("", False), ("_signed", True)):
      results[name][f"tug_of_war{suffix}"] = tow.tug_of_war(
        accuracies[name], accuracies["retrained"], signed=signed
      )
  return results, examples


def summarize(stages: Stages, results: Record, records: Mapping[str, Record]) -> Record:
  """The content of `summary.json`.

  Args:
    stages: stages of the experiment.
    results: results by model of `evaluate_models`.
    records: records of the stages by name.
  """
  final = records[stages.prepared.plan.final]
  summary = {
    "method": stages.prepared.config.method.name,
    "results": results,
    # An imported model has no steps.
    "steps": final.get("steps", 0),
    "stop_reason": final["stop_reason"],
    "seconds": {name: record["seconds"] for name, record in records.items()},
    "provenance": _provenance(stages, records),
  }
  if timing := {name: record["timing"] for name, record in records.items() if record.get("timing")}:
    summary["timing"] = timing
  work = {
    name: record["work"] | {"tokens_per_second": record["work"]["tokens"] / record["seconds"]}
    for name, record in records.items()
    if record.get("work")
  }
  return summary | ({"work": work} if work else {})


def origin(prepared: Preparation) -> Record:
  """The provenance of all that is computed in an experiment: versions, devices, data, configuration."""
  versions = {
    name: importlib.metadata.version(name)
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  }
  return {
    "versions": versions | {"hamu-jax": hamu_jax.__version__, "python": platform.python_version()},
    "device": prepared.devices[0].device_kind,
    "devices": len(prepared.devices),
    "processes": jax.process_count(),
    "data_fingerprint": prepared.task.request.fingerprint,
    **prepared.task.provenance,
    "config_fingerprint": fingerprint(prepared.config.to_dict()),
    "scores_fingerprint": scores_fingerprint(prepared.scores),
  }


def _provenance(stages: Stages, records: Mapping[str, Record]) -> Record:
  """The provenance of the results of a run."""
  prepared = stages.prepared
  keys, reference = prepared.plan.keys, readers.given_reference(prepared.config)
  return origin(prepared) | {
    "stages": {name: key for name, key in keys.items() if name in records},
    # The number of models that shared the program of a stage, and its seconds.
    "together": {
      name: record["together"] for name, record in records.items() if record.get("together", 1) > 1
    },
    **({"retrained_checkpoint": reference} if reference else {}),
    "parent_checkpoint": prepared.config.model.weights
    or str(stages.cache.folder("pretrain", keys["pretrain"])),
  }


def leave(
  workdir: pathlib.Path,
  stages: Stages,
  summary: Record,
  models: Mapping[str, Tree],
  mask: Tree | None,
  examples: Mapping[str, Record],
) -> None:
  """Writes models, split, figures and, last, the summary to the run directory, and prints the table.

  Args:
    workdir: run directory.
    stages: stages of the experiment.
    summary: content of `summary.json`.
    models: variables by name.
    mask: mask of the unlearned weights, or None.
    examples: values of single examples of `evaluate_models`.
  """
  with progress.Progress("saving"):
    _save(workdir, stages.prepared, models, mask, examples)
    _draw(workdir, stages.prepared, summary)
    stages.rundir.write_json("summary.json", summary)
  for split, count in summary["provenance"].get("cut", {}).items():
    print(f"{split}: {count} examples were cut to config.text.max_length tokens")
  tables.print_results(summary)
  print(f"{summary['method']}: {summary['stop_reason']}; everything is in {workdir}")


def _save(workdir: pathlib.Path, prepared: Preparation, models, mask: Tree | None, examples) -> None:
  """The models, the values of single examples, the mask and the split; see `leave`."""
  for name, model in models.items():
    prepared.task.save(workdir, name, model)
  leave_examples(workdir, examples)
  if mask is not None:
    prepared.task.save(workdir, "mask", {"params": mask})
  rundir_lib.write_arrays(
    workdir / "split.npz", validation=prepared.task.request.validation, **prepared.split._asdict()
  )


def leave_examples(workdir: pathlib.Path, examples: Mapping[str, Record]) -> None:
  """Writes the values of single examples of `evaluate_models`."""
  for name, kinds in examples.items():
    for kind, splits in kinds.items():
      (workdir / "examples").mkdir(exist_ok=True)
      rundir_lib.write_json(workdir / "examples" / f"{name}-{kind}.json", splits)


def _draw(workdir: pathlib.Path, prepared: Preparation, summary: Record) -> None:
  """The figures of a run."""
  rows = read_metrics(workdir).rows
  title = summary["method"]
  run_plots.tradeoff(rows, workdir / "tradeoff.png", references=summary["results"], title=title)
  names = tensor_names(prepared.template["params"])
  run_plots.alignment(rows, workdir / "alignment.png", title=title, names=names)
