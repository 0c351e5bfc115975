"""Compares the features and loss landscapes of two models of a run, before and after unlearning.

  python -m hamu_jax.analysis.geometry --run=runs/digits
  python -m hamu_jax.analysis.geometry --run=runs/digits --after=retrained --out=figures

Reads a run directory: its configuration, its retain and forget sets (split.npz) and two models, by
default the original and the unlearned one. Writes to --out (default: geometry/ in the run)

    geometry.json            every number
    umap.png, .pdf           retain and forget features of both models on one UMAP
    landscape.png, .pdf      the retain, forget and test loss around both models

and prints the tables. Needs POT and umap-learn: pip install 'hamu-jax[analysis]'.
"""

import argparse
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hamu_jax.run import preemption

if __name__ == "__main__":
  # The other imports take seconds.
  preemption.leave_on_signals()

from hamu_jax import models
from hamu_jax.analysis import geometry_plots
from hamu_jax.analysis.examples import LEAST_EXAMPLES, load_run
from hamu_jax.analysis.features import NEIGHBOURS, extract_features, measure, project
from hamu_jax.analysis.landscapes import compute_landscapes
from hamu_jax.errors import UserError
from hamu_jax.paired import Paired
from hamu_jax.run import command_line, rundir
from sam_jax import landscape

_MODELS = ("original", "retrained", "unlearned")
_PACKAGES = {"ot": "POT", "umap": "umap-learn"}


def tables(report: Mapping[str, Any]) -> str:
  """Formats the entanglement and the flatness of a report as aligned text.

  Args:
    report: The content of geometry.json.
  """
  measures = [
    [
      "",
      "entanglement",
      "variance ratio",
      "variance / 1300",
      "wasserstein",
      "silhouette",
      "svm",
      f"{NEIGHBOURS}-nn",
    ]
  ]
  for name, kinds in report["entanglement"].items():
    for kind, values in kinds.items():
      measures.append([name, kind.replace("_", "-"), *map(_cell, values.values())])
  shares = "/".join(f"{100 * share:g}" for share in landscape.PROFILE)
  flat = [["", "landscape", "loss", "variability", "gradient", "basin %", f"% within {shares} %"]]
  for name, sets in report["landscape"].items():
    for role, values in sets.items():
      profile = "/".join(f"{share:.0f}" for share in values["profile"])
      numbers = (values[key] for key in ("loss", "variability", "gradient", "basin"))
      flat.append([name, role, *map(_cell, numbers), profile])
  return f"{_aligned(measures)}\n\n{_aligned(flat)}"


def _cell(value: float | None) -> str:
  return "-" if value is None else f"{value:.4g}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
  """Aligns rows, with a rule below the first; the first two columns to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = [
    "  ".join(
      [
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths))
      ]
    )
    for row in rows
  ]
  return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _whole(least: int, *, odd: bool = False) -> Callable[[str], int]:
  """A parser of whole numbers of at least `least`."""

  def parse(text):
    value = int(text) if text.lstrip("-").isdecimal() else least - 1
    if value < least or odd and value % 2 == 0:
      kind = "an odd number" if odd else "a whole number"
      raise argparse.ArgumentTypeError(f"{text!r}: choose {kind} of at least {least}")
    return value

  return parse


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  parser = command_line.Parser(prog="python -m hamu_jax.analysis.geometry", description=__doc__)
  model = f"{', '.join(_MODELS)}, or a safetensors file"
  parser.add_argument("--run", type=pathlib.Path, required=True, help="run directory")
  parser.add_argument("--before", default="original", help=f"first model: {model}")
  parser.add_argument("--after", default="unlearned", help=f"second model: {model}")
  parser.add_argument("--out", type=pathlib.Path, help="folder to write to; default RUN/geometry")
  parser.add_argument(
    "--max_examples",
    type=_whole(LEAST_EXAMPLES),
    default=2000,
    help="number of examples per set for features",
  )
  parser.add_argument(
    "--landscape_points",
    type=_whole(3, odd=True),
    default=25,
    help="number of points along each direction; odd, so that the model itself is one of them",
  )
  parser.add_argument(
    "--landscape_examples", type=_whole(1), default=256, help="number of examples per set for landscapes"
  )
  parser.add_argument(
    "--normalization",
    choices=landscape.NORMALIZATIONS,
    default="filter",
    help="normalization of the directions; tensor is the sharpness paper's",
  )
  parser.add_argument(
    "--seed", type=_whole(0), default=0, help="seed of examples, directions, UMAP and transport samples"
  )
  return parser.parse_args(arguments)


def _weights_file(options: argparse.Namespace, flag: str) -> pathlib.Path:
  """The weights of the model that --before or --after names."""
  name = getattr(options, flag)
  file = options.run / f"{name}.safetensors" if name in _MODELS else pathlib.Path(name)
  if not file.exists():
    raise UserError(
      f"--{flag}={name}: {file} does not exist; choose one of {', '.join(_MODELS)} that the run "
      "has, or a safetensors file"
    )
  return file


def _analyse(options: argparse.Namespace) -> None:
  if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
    raise UserError(f"{_PACKAGES[missing[0]]} is not installed; pip install 'hamu-jax[analysis]'")
  run = load_run(options.run, options.max_examples, options.seed)
  files = {flag: _weights_file(options, flag) for flag in ("before", "after")}
  # The file of a model without batch norm has no statistics.
  variables = {
    name: {"batch_stats": {}} | models.load_weights(file, run.template) for name, file in files.items()
  }
  out = options.out or options.run / "geometry"
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--out={out}: {error.strerror or error}; choose another folder") from error

  features = extract_features(run, variables)
  print("entanglement", file=sys.stderr)
  entangled = {name: measure(sets, run.examples, options.seed) for name, sets in features.items()}
  print(
    f"UMAP of {sum(len(array) for sets in features.values() for array in sets)} features", file=sys.stderr
  )
  titles = {name: f"{name}: {file.stem}" for name, file in files.items()}
  geometry_plots.umap(
    {titles[name]: sets for name, sets in project(features, options.seed).items()},
    Paired(*(examples.labels for examples in run.examples)),
    out / "umap",
  )
  coordinates, grids = compute_landscapes(
    run,
    variables,
    points=options.landscape_points,
    max_examples=options.landscape_examples,
    normalization=options.normalization,
    seed=options.seed,
  )
  geometry_plots.landscapes(
    coordinates, {titles[name]: losses for name, losses in grids.items()}, out / "landscape"
  )
  middle = options.landscape_points // 2
  report = {
    "models": files,
    "options": {name: value for name, value in vars(options).items() if name not in files},
    "examples": {
      role: len(set_.labels) for role, set_ in (*run.examples._asdict().items(), ("test", run.test))
    },
    "entanglement": entangled,
    "landscape": {
      name: {
        role: {"loss": losses[middle, middle]} | landscape.flatness(losses)._asdict()
        for role, losses in sets.items()
      }
      for name, sets in grids.items()
    },
  }
  rundir.write_json(out / "geometry.json", report)
  print(tables(report))
  print(f"everything is in {out}")


def run(arguments: Sequence[str]) -> int:
  """Parses a command line and runs it.

  Args:
    arguments: Command line in the form of `sys.argv`, the program's name first.

  Returns:
    The exit status: 0, or 2 for bad input.
  """
  return command_line.run(lambda: _analyse(_parse(arguments[1:])))


if __name__ == "__main__":
  sys.exit(run(sys.argv))
