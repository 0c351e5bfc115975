"""Made-up run directories."""

import json

from hamu_jax.config import default as config_lib
from hamu_jax.report import gather
from hamu_jax.run import rundir


def _config(**fields):
  """The resolved default configuration on the digits; fields as section__name."""
  config = config_lib.default_config()
  config.data.source, config.data.name = "digits", ""
  with config.unlocked():
    for field, value in fields.items():
      *sections, name = field.split("__")
      place = config
      for section in sections:
        place = place[section]
      place[name] = value
  return rundir.jsonable(config.to_dict())


def write(path, *, unlearned=0.5, original=0.9, finished=True, rows=(), torn="", data="d" * 64, **fields):
  """A run directory whose accuracies are the given numbers."""
  path.mkdir(parents=True)
  rundir.write_json(path / "config.json", _config(**fields))
  (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
  if finished:

    def result(accuracy):
      return {split: {"accuracy": accuracy, "loss": 1.0} for split in ("retain", "forget", "test")}

    rundir.write_json(
      path / "summary.json",
      {
        "method": "any",
        "steps": 4,
        "stop_reason": "finished after 4 applied steps",
        "results": {"original": result(original), "unlearned": result(unlearned)},
        "seconds": {"pretrain": 3.0, "unlearn": 2.0},
        "provenance": {"device": "cpu", "devices": 1, "data_fingerprint": data},
      },
    )
  return path


def step(step, **values):
  return {"stage": "unlearn", "step": step, "split": "step", **values}


def study(*paths):
  (found,) = gather.studies(gather.gather(paths).runs)
  return found
