"""Runs methods with and without SAM on memorization-ranked forget sets, and prints the results as a table.

  python benchmarks/sharpness_table.py --config=configs/digits_sharp.py --out=runs/digits-table

Every run uses `hamu_jax.main` with one stage cache, so the ensemble, the original and the retrained models
are trained once. A second call reads finished runs from their directories. Arguments after `--` are passed to
every run, for example `-- --config.data.source=parquet --config.data.path=DIR`.
"""

import argparse
import itertools
import json
import pathlib
import sys

from hamu_jax import main, models
from hamu_jax.analysis import geometry
from hamu_jax.launch import experiments

_METHODS = (*experiments.SHARP_METHODS, "hamu-q")
_COLUMNS = (
  "method",
  "retain",
  "forget",
  "test",
  "tug of war",
  "unseen by MIA",
  "variance ent.",
  "Wasserstein ent.",
  "seconds",
)
# Number of examples of each set whose features are compared.
_EXAMPLES = 1000


def run(args, method, sam, level):
  """Runs one experiment, unless it is finished, and returns its run directory."""
  words = [method, level, *(["sam"] if sam else []), *args.words]
  folder = pathlib.Path(args.out) / "-".join(words)
  if not (folder / "summary.json").exists():
    status = main.run(
      [
        "hamu_jax.main",
        f"--config={args.config}:{','.join(words)}",
        f"--workdir={folder}",
        f"--config.stage_cache={args.out}/stages",
        *args.rest,
      ]
    )
    if status:
      sys.exit(status)
  return folder


def entanglement(folder, name):
  """Returns variance (raw ratio) and Wasserstein entanglement of a model's retain and forget features."""
  measured = geometry.load_run(folder, _EXAMPLES, 0)
  variables = models.load_weights(folder / f"{name}.safetensors", measured.template)
  features = geometry.extract_features(measured, {name: variables})[name]
  values = geometry.measure(features, measured.examples, 0)["global"]
  return values["variance_ratio"], values["wasserstein"]


def row(folder, label, name, stage):
  """One line of the table; `name` is the model's name in the summary, `stage` the stage that is timed."""
  summary = json.loads((folder / "summary.json").read_text())
  result = summary["results"][name]
  variance, wasserstein = entanglement(folder, name)
  return [
    label,
    *(f"{100 * result[split]['accuracy']:.1f}" for split in ("retain", "forget", "test")),
    f"{result['tug_of_war']:.3f}" if "tug_of_war" in result else "",
    f"{result['membership']['confidence']:.2f}",
    f"{variance:.1f}",
    f"{wasserstein:.3f}",
    f"{summary['seconds'][stage]:.0f}",
  ]


def print_level(args, level):
  """Runs and prints all methods on one forget set."""
  rows = []
  for method, sam in itertools.product(args.methods, (False, True)):
    folder = run(args, method, sam, level)
    if not rows:
      rows += [
        row(folder, "*original*", "original", "pretrain"),
        row(folder, "*retrained*", "retrained", "retrain"),
      ]
    rows.append(row(folder, f"`{method}`{' SAM' if sam else ''}", "unlearned", "unlearn"))
  print(f"\n{level} memorization\n", flush=True)
  for cells in (_COLUMNS, ["---"] * len(_COLUMNS), *rows):
    print(f"| {' | '.join(cells)} |", flush=True)


def parse():
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/digits_sharp.py")
  parser.add_argument("--out", default="runs/sharpness-table", help="folder of the runs")
  parser.add_argument("--methods", type=lambda text: text.split(","), default=_METHODS)
  parser.add_argument("--levels", type=lambda text: text.split(","), default=["high", "mid", "low"])
  parser.add_argument(
    "--words", type=lambda text: text.split(","), default=[], help="further words of the variant"
  )
  parser.add_argument("rest", nargs="*", help="arguments of every run, after --")
  return parser.parse_args()


if __name__ == "__main__":
  arguments = parse()
  for memorization_level in arguments.levels:
    print_level(arguments, memorization_level)
