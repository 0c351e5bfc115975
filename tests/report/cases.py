"""Studies of made-up runs for figures, and what figures show, read back from their axes."""

import pathlib

import numpy as np

from hamu_jax.config import default as config_lib
from hamu_jax.report import gather
from hamu_jax.report.runs import Run
from hamu_jax.run import rundir

DEFAULTS = dict(rundir.fields(rundir.jsonable(config_lib.default_config().to_dict())))
SPLITS = ("retain", "forget", "test")


def run(seed=1, *, unlearned=(1, 0.5, 0.9), diagnostics=None, results=None, seconds=8.0, **fields):
  """A finished run with the given accuracies."""
  fields = {name.replace("__", "."): value for name, value in fields.items()}
  unlearned = {split: {"accuracy": accuracy} for split, accuracy in zip(SPLITS, unlearned)} | {
    "tug_of_war": unlearned[2]
  }
  retrained = {split: {"accuracy": accuracy} for split, accuracy in zip(SPLITS, (0.95, 0.3, 0.8))}
  summary = {
    "results": results or {"unlearned": unlearned, "retrained": retrained, "original": retrained},
    "steps": 4,
    "seconds": {"unlearn": seconds},
    "provenance": {"data_fingerprint": "d", "device": "cpu", "devices": 1},
  }
  return Run(
    pathlib.Path("run"), DEFAULTS | fields | {"seed": seed}, summary, ("unlearn", 4), diagnostics or {}
  )


def study(*runs):
  (found,) = gather.studies(runs)
  return found


def sweep(methods=("hamu-q", "hamu-u"), ratios=(0.1, 0.5, 0.9), seeds=(1, 2), **fields):
  rng = np.random.default_rng(0)
  return [
    run(
      seed,
      unlearned=rng.uniform(0.2, 1, 3),
      seconds=rng.uniform(1, 9),
      **fields,
      method__name=method,
      method__constraint_ratio=ratio,
    )
    for method in methods
    for ratio in ratios
    for seed in seeds
  ]


def diagnostics(seed, steps=12, tensors=5):
  rng = np.random.default_rng(seed)
  at = np.arange(1, steps + 1)
  return {
    "angle": (at, rng.uniform(0, 180, (steps, tensors))),
    "branch": (at, rng.integers(0, 3, (steps, tensors)).astype(float)),
  }


def language_run(seed, method, utility):
  suite = {
    "retain": {"rouge": utility / 2},
    "forget": {"rouge": utility / 3},
    "model_utility": utility,
    "forget_quality": 10.0 ** (-20 * utility),
  }
  result = {split: {"accuracy": 0.5} for split in SPLITS} | {"suite": suite}
  retrained = {"suite": {"retain": {"rouge": 0.4}, "forget": {"rouge": 0.1}}}
  return run(seed, method__name=method, results={"unlearned": result, "retrained": retrained})


def line(axis, label):
  """Of an error bar or a line."""
  found = dict(zip(*axis.get_legend_handles_labels()[::-1]))[label]
  return (found.lines[0] if hasattr(found, "has_yerr") else found).get_xydata()
