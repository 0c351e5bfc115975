"""Made-up run directories for reports, and the tables of them."""

import json

from hamu_jax.config import default as config_lib
from hamu_jax.report import gather, study_tables
from hamu_jax.run import rundir

SPLITS = ("retain", "forget", "test")


def write(
  path,
  *,
  values=(1.0, 0.5, 0.75),
  method="hamu-q",
  seed=1,
  ratio=0.5,
  data="d" * 64,
  finished=True,
  torn="",
  suite=None,
  source="digits",
  unlearning_seed=None,
):
  """A run directory whose unlearned model has the given accuracies."""
  path.mkdir(parents=True)
  config = config_lib.default_config()
  config.data.source, config.seed, config.method.seed = source, seed, unlearning_seed
  config.method.name, config.method.constraint_ratio = method, ratio
  rundir.write_json(path / "config.json", config.to_dict())
  row = {"stage": "unlearn", "step": 3, "split": "step", "angle": [80.0, 100.0], "branch": [0, 1]}
  (path / "metrics.jsonl").write_text(json.dumps(row) + "\n" + torn)
  if finished:

    def result(accuracies):
      return {split: {"accuracy": value, "loss": 1e-6} for split, value in zip(SPLITS, accuracies)}

    unlearned = result(values) | {"tug_of_war": values[2], "membership": {"confidence": 0.25}}
    rundir.write_json(
      path / "summary.json",
      {
        "method": method,
        "steps": 4,
        "stop_reason": "finished | <b>after</b> 100% & more",
        "results": {
          "original": result((1, 1, 1)),
          "retrained": result((1, 0, 1)),
          "unlearned": unlearned | ({"suite": suite} if suite else {}),
        },
        "seconds": {"pretrain": 3.0, "unlearn": 2.0},
        "provenance": {"device": "cpu", "devices": 1, "data_fingerprint": data},
      },
    )
  return path


def tables(*paths):
  (study,) = gather.studies(gather.gather(paths).runs)
  return {table.name: table for table in study_tables.tables(study)}
