"""What unlearning did to a model's features and to the loss around it, for any pair of checkpoints.

  python -m hamu_jax.analysis.geometry --run=runs/digits
  python -m hamu_jax.analysis.geometry --run=runs/digits --after=retrained --out=figures

Reads a run directory: its configuration, its retain and forget rows (split.npz) and two models, by
default the original and the unlearned one. Writes to --out (default: geometry/ in the run)

    geometry.json            every number
    umap.png, .pdf           retain and forget features of both models on one UMAP
    landscape.png, .pdf      the retain and the forget loss around both models

and prints the tables. Needs POT and umap-learn: pip install 'hamu-jax[analysis]'.

Axis legend: N examples of a set, M microbatches, B examples of a microbatch, D features, P points
of a landscape along a direction.
"""

import argparse
import functools
import importlib.util
import itertools
import pathlib
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import lax

from hamu_jax import models
from hamu_jax.analysis import geometry_plots
from hamu_jax.config import default as config_lib
from hamu_jax.errors import UserError, first_line
from hamu_jax.metrics import classification
from hamu_jax.paired import Paired
from hamu_jax.run import command_line, progress, rundir
from hamu_jax.vision import task as vision
from sam_jax import entanglement, landscape

Tree = Any
_MODELS = ("original", "retrained", "unlearned")
_PACKAGES = {"ot": "POT", "umap": "umap-learn"}
_KNN = 10
# Smaller sets have no neighbourhoods that a map could show.
_LEAST_EXAMPLES = 5
# Measures of entanglement, and how many examples of a class each set must have for them.
_MEASURES = {
  "variance_ratio": (entanglement.variance_entanglement, 1),
  "variance": (
    functools.partial(entanglement.variance_entanglement, normalizer=entanglement.REFERENCE_NORMALIZER),
    1,
  ),
  "wasserstein": (entanglement.wasserstein_entanglement, 2),
  "silhouette": (entanglement.silhouette_entanglement, 2),
  "knn": (functools.partial(entanglement.knn_entanglement, k=_KNN), _KNN + 1),
}


class Examples(NamedTuple):
  """Some examples of a set."""

  images: np.ndarray  # [N, H, W, C] uint8
  labels: np.ndarray  # [N]


class Run(NamedTuple):
  """What a run directory says about an experiment."""

  config: ml_collections.ConfigDict
  model: Any  # linen module
  template: Tree  # shapes of its variables
  examples: Paired  # of Examples


def load_run(path: pathlib.Path, max_examples: int, seed: int) -> Run:
  """Reads the configuration and the rows of a run, and loads their images.

  Args:
    path: The run directory.
    max_examples: A larger set is represented by so many of its rows, drawn with `seed`.
    seed: Of that draw.

  Raises:
    UserError: a file is missing or damaged, does not fit the dataset, or a set is too small.
  """
  if not (path / "config.json").is_file():
    raise UserError(f"--run={path}: it has no config.json; choose the directory of a finished run")
  config = ml_collections.ConfigDict(rundir.read_json(path / "config.json"))
  rows = _read_split(path / "split.npz")
  try:
    dataset = config_lib.load_dataset(config.data)
    classes = len(dataset.class_names)
    model = config_lib.build_model(config.model, num_classes=classes)
  except AttributeError as error:
    raise UserError(
      f"{path / 'config.json'}: {first_line(error)}; run the experiment again with this version"
    ) from error
  images, labels = dataset.train
  rng = np.random.default_rng(seed)
  sets = []
  for role, chosen in rows._asdict().items():
    if len(chosen) < _LEAST_EXAMPLES:
      raise UserError(
        f"{path / 'split.npz'}: the {role} set has {len(chosen)} rows, too few to compare; "
        f"choose a run with {_LEAST_EXAMPLES} at least"
      )
    if chosen.min() < 0 or chosen.max() >= len(labels):
      raise UserError(
        f"{path / 'split.npz'}: {role} rows {chosen.min()}..{chosen.max()} are not all among the "
        f"{len(labels)} training rows of config.data; has the data changed since the run?"
      )
    if len(chosen) > max_examples:
      chosen = np.sort(rng.choice(chosen, max_examples, replace=False))
    sets.append(Examples(np.asarray(images[chosen]), labels[chosen]))

  template = jax.eval_shape(vision.make_init(model, images.shape[1:]), 0)
  return Run(config, model, template, Paired(*sets))


def extract_features(run: Run, variables: Mapping[str, Tree]) -> dict[str, Paired]:
  """The inputs of the classifier in evaluation mode: [N, D] of each set, by model.

  Args:
    run: The run.
    variables: Of each model.

  Raises:
    UserError: they are not finite.
  """
  forward = jax.jit(vision.make_features(run.model, run.config.data.mean, run.config.data.std))
  batches = Paired(*(_microbatches(examples, len(examples.labels))[0] for examples in run.examples))
  collected = {name: Paired([], []) for name in variables}
  jobs = [
    (name, role, batch) for name in variables for role in Paired._fields for batch in getattr(batches, role)
  ]
  with progress.Progress("features", len(jobs)) as bar:
    for step, (name, role, batch) in enumerate(jobs, start=1):
      getattr(collected[name], role).append(np.asarray(forward(variables[name], batch)))
      bar.update(step)
  features = {
    name: Paired(
      *(
        np.concatenate(parts)[: len(examples.labels)].reshape(len(examples.labels), -1)
        for parts, examples in zip(sets, run.examples)
      )
    )
    for name, sets in collected.items()
  }
  for name, sets in features.items():
    if not all(np.isfinite(features_NxD).all() for features_NxD in sets):
      raise UserError(f"the features of the model {name!r} are not finite: it has diverged")
  return features


def measure(features: Paired, examples: Paired, seed: int) -> dict[str, dict[str, float | None]]:
  """Entanglement of retain and forget features by every measure, global and class-wise.

  Args:
    features: [N, D] of each set.
    examples: `Examples` of each set.
    seed: Of the Wasserstein measure's samples.

  Returns:
    ``{"global" | "class_wise": {measure: value}}``; None where no class has enough examples in both
    sets for a class-wise value, as when whole classes are forgotten.
  """
  labels = {"retain_labels": examples.retain.labels, "forget_labels": examples.forget.labels}
  sizes = [len(features_NxD) for features_NxD in features]
  report = {"global": {}, "class_wise": {}}
  for name, (function, least) in _MEASURES.items():
    options = {"seed": seed} if name == "wasserstein" else {}
    if min(sizes) >= least:
      report["global"][name] = function(*features, **options)
    if entanglement.shared_classes(*labels.values(), least):
      report["class_wise"][name] = function(*features, **labels, **options)
  return {kind: {name: values.get(name) for name in _MEASURES} for kind, values in report.items()}


def project(features: Mapping[str, Paired], seed: int) -> dict[str, Paired]:
  """One UMAP of the features of all models and sets, in cosine distance.

  They are embedded together, so that a place means the same in the picture of each model and what
  moved can be seen to have moved. Models far apart (before and after retraining, say) fall into
  islands of their own; the neighbourhood of retain and forget within each can still be compared.

  Args:
    features: [N, D] of each set of each model.
    seed: Makes the map reproducible.

  Returns:
    [N, 2] of each set of each model.
  """
  from umap import UMAP

  arrays = [features_NxD for sets in features.values() for features_NxD in sets]
  together = np.concatenate(arrays)
  embedding = UMAP(
    n_neighbors=min(15, len(together) - 1),
    metric="cosine",
    random_state=seed,
    n_jobs=1,
  ).fit_transform(together)
  places = iter(np.split(embedding, np.cumsum([len(array) for array in arrays])[:-1]))
  return {name: Paired(*(next(places) for _ in sets)) for name, sets in features.items()}


def compute_landscapes(
  run: Run,
  variables: Mapping[str, Tree],
  *,
  points: int,
  max_examples: int,
  normalization: str,
  seed: int,
) -> tuple[np.ndarray, dict[str, Paired]]:
  """Mean losses of retain and forget examples on a plane around each model.

  All models share the random draws of the two directions, each scaled to the model's own weights.

  Args:
    run: The run.
    variables: Of each model.
    points: Along each direction, from -1 to 1; odd.
    max_examples: Examples of each set that the loss is taken over, the first ones.
    normalization: Of the directions, see `sam_jax.landscape.scale_draws`.
    seed: Of the draws.

  Returns:
    The coordinates [P], and by model the losses [P, P] of each set, in nats.
  """
  config = run.config.data
  forward = vision.make_forward(run.model, config.mean, config.std, None)

  @jax.jit
  def row(variables, plane, batches, alphas, beta):
    def mean_loss(params):
      def summed(batch):
        images, labels, mask = batch
        outputs, _ = forward(variables | {"params": params}, {"image": images}, None, False)
        losses = classification.per_example(outputs.logits, labels)["loss"]
        return jnp.sum(jnp.where(mask, losses, 0))

      return jnp.sum(lax.map(summed, batches)) / jnp.sum(batches[2])

    return landscape.loss_grid(mean_loss, variables["params"], plane, alphas, beta[None])[0]

  coordinates = np.linspace(-1, 1, points, dtype=np.float32)
  # Of one shape, so that one program serves both sets.
  size = min(max_examples, max(len(examples.labels) for examples in run.examples))
  batches = Paired(
    *(
      jax.device_put(_microbatches(Examples(*(array[:size] for array in examples)), size))
      for examples in run.examples
    )
  )
  planes = {
    name: landscape.directions(model["params"], jax.random.key(seed), normalization=normalization)
    for name, model in variables.items()
  }
  grids = {name: Paired(np.zeros((points, points)), np.zeros((points, points))) for name in variables}
  jobs = list(itertools.product(variables, Paired._fields, range(points)))
  with progress.Progress("landscape", len(jobs)) as bar:
    for step, (name, role, index) in enumerate(jobs, start=1):
      getattr(grids[name], role)[index] = row(
        variables[name], planes[name], getattr(batches, role), coordinates, coordinates[index]
      )
      bar.update(step)
  return coordinates, grids


def tables(report: Mapping[str, Any]) -> str:
  """The entanglement and the flatness in a report as aligned text.

  Args:
    report: The content of geometry.json.
  """
  measures = [
    ["", "entanglement", "variance ratio", "variance / 1300", "wasserstein", "silhouette", f"{_KNN}-nn"]
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
  """Rows as lines, the first one above a rule; two columns to the left, the others to the right."""
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


def _read_split(path: pathlib.Path) -> Paired:
  """The retain and the forget rows of a run."""
  try:
    with np.load(path, allow_pickle=False) as arrays:
      rows = Paired(*(arrays[role] for role in Paired._fields))
  except FileNotFoundError as error:
    raise UserError(f"{path} does not exist; choose the directory of a finished run") from error
  except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
    raise UserError(
      f"{path} holds no retain and forget rows ({first_line(error)}); run the experiment again"
    ) from error
  for role, chosen in rows._asdict().items():
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
      raise UserError(
        f"{path}: {role} is {chosen.dtype} of shape {chosen.shape}, not one vector of integers; "
        "run the experiment again"
      )
  return rows


def _microbatches(examples: Examples, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Images [M, B, H, W, C], labels [M, B] and whether they count [M, B], padded from `size` on."""
  width = min(size, models.microbatch_size(*examples.images.shape[1:3]))
  count = -(-size // width)
  missing = count * width - len(examples.labels)

  def cut(array):
    padded = np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
    return padded.reshape(count, width, *array.shape[1:])

  return cut(examples.images), cut(examples.labels), cut(np.ones(len(examples.labels), bool))


def _whole(least: int, *, odd: bool = False) -> Callable[[str], int]:
  """A parser of whole numbers from `least` on."""

  def parse(text):
    value = int(text) if text.lstrip("-").isdecimal() else least - 1
    if value < least or odd and value % 2 == 0:
      kind = "an odd number" if odd else "a whole number"
      raise argparse.ArgumentTypeError(f"{text!r}: choose {kind} from {least} on")
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
    "--max_examples", type=_whole(_LEAST_EXAMPLES), default=2000, help="examples of each set for features"
  )
  parser.add_argument(
    "--landscape_points",
    type=_whole(3, odd=True),
    default=25,
    help="points along each direction, odd so that the model itself is one",
  )
  parser.add_argument(
    "--landscape_examples", type=_whole(1), default=256, help="examples of each set for landscapes"
  )
  parser.add_argument(
    "--normalization",
    choices=landscape.NORMALIZATIONS,
    default="filter",
    help="of directions; tensor is the sharpness paper's",
  )
  parser.add_argument(
    "--seed", type=_whole(0), default=0, help="of examples, directions, UMAP and transport samples"
  )
  return parser.parse_args(arguments)


def _weights_file(options: argparse.Namespace, flag: str) -> pathlib.Path:
  """The file of the model that --before or --after asks for."""
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
  # Of a model without batch norm the file has no statistics at all.
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
    {titles[name]: sets for name, sets in project(features, options.seed).items()}, out / "umap"
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
    "examples": {role: len(set_.labels) for role, set_ in run.examples._asdict().items()},
    "entanglement": entangled,
    "landscape": {
      name: {
        role: {"loss": losses[middle, middle]} | landscape.flatness(losses)._asdict()
        for role, losses in sets._asdict().items()
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
    arguments: As `sys.argv`, the program's name first.

  Returns:
    The exit status: 0, or 2 for bad input.
  """
  return command_line.run(lambda: _analyse(_parse(arguments[1:])))


if __name__ == "__main__":
  sys.exit(run(sys.argv))
