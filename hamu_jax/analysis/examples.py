"""Loads a finished run: its configuration, its model, and the images of its retain, forget and test sets.

Axis legend: N examples of a set, M microbatches, B examples of a microbatch.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from hamu_jax import data, models, outside
from hamu_jax.config import default as config_lib
from hamu_jax.errors import UserError
from hamu_jax.paired import Paired
from hamu_jax.run import rundir
from hamu_jax.vision import task as vision

Tree = Any

# Smaller sets have no neighbourhoods that UMAP could show.
LEAST_EXAMPLES = 5


class Examples(NamedTuple):
  """Some examples of a set."""

  images: np.ndarray  # [N, H, W, C] uint8
  labels: np.ndarray  # [N]


class Run(NamedTuple):
  """The experiment of a run directory."""

  config: ml_collections.ConfigDict
  model: Any  # linen module
  template: Tree  # shapes of the model's variables
  examples: Paired  # `Examples` of each role
  test: Examples  # of the test set


def load_run(path: pathlib.Path, max_examples: int, seed: int) -> Run:
  """Reads the configuration and the split of a run, and loads the images.

  Args:
    path: The run directory.
    max_examples: Largest number of examples of a set; they are drawn from a larger set with `seed`.
    seed: Seed of that draw.

  Returns:
    The run.

  Raises:
    UserError: if a file is missing or damaged or does not fit the dataset, or a set is too small.
  """
  if not (path / "config.json").is_file():
    raise UserError(f"--run={path}: it has no config.json; choose the directory of a finished run")
  config = _read_config(path / "config.json")
  rows = _read_split(path / "split.npz")
  dataset = config_lib.load_dataset(config.data)
  model = config_lib.build_model(config.model, num_classes=len(dataset.class_names))
  images, labels = dataset.train
  rng = np.random.default_rng(seed)
  sets = []
  for role, chosen in rows._asdict().items():
    if len(chosen) < LEAST_EXAMPLES:
      raise UserError(
        f"{path / 'split.npz'}: the {role} set has {len(chosen)} examples, too few to compare; "
        f"choose a run with at least {LEAST_EXAMPLES}"
      )
    if chosen.min() < 0 or chosen.max() >= len(labels):
      raise UserError(
        f"{path / 'split.npz'}: {role} indices {chosen.min()}..{chosen.max()} are not all among the "
        f"{len(labels)} training examples of config.data; restore the data of the run, or run it again"
      )
    sets.append(_drawn(dataset.train, chosen, max_examples, rng))
  test = _drawn(dataset.test, np.arange(len(dataset.test.labels)), max_examples, rng)
  template = jax.eval_shape(vision.make_init(model, images.shape[1:]), 0)
  return Run(config, model, template, Paired(*sets), test)


def _drawn(split: data.ImageSplit, chosen: np.ndarray, most: int, rng: np.random.Generator) -> Examples:
  """Some of the chosen examples of a split, in order."""
  if len(chosen) > most:
    chosen = np.sort(rng.choice(chosen, most, replace=False))
  return Examples(np.asarray(split.images[chosen]), split.labels[chosen])


def microbatches(examples: Examples, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Images [M, B, H, W, C], labels [M, B] and masks [M, B] of at least `size` examples with padding."""
  width = min(size, models.microbatch_size(*examples.images.shape[1:3]))
  count = -(-size // width)
  missing = count * width - len(examples.labels)

  def cut(array):
    padded = np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
    return padded.reshape(count, width, *array.shape[1:])

  return cut(examples.images), cut(examples.labels), cut(np.ones(len(examples.labels), bool))


def _read_config(path: pathlib.Path) -> ml_collections.ConfigDict:
  """Reads the configuration of a run; fields that are newer than the run have their defaults."""
  stored, defaults = rundir.read_json(path), config_lib.default_config().to_dict()
  for section in ("data", "model"):
    if not isinstance(stored.get(section), dict):
      raise UserError(f"{path}: it has no section {section!r}; run the experiment again with this version")
    stored[section] = defaults[section] | stored[section]
  return ml_collections.ConfigDict(stored)


def _read_split(path: pathlib.Path) -> Paired:
  """Reads the indices of a run's retain and forget examples."""
  if not path.is_file():
    raise UserError(f"{path} does not exist; choose the directory of a finished run")
  with outside.read_of(path, "retain and forget indices", "run the experiment again"):
    arrays = outside.arrays_of(path, Paired._fields)
    rows = Paired(*(arrays[role] for role in Paired._fields))
  for role, chosen in rows._asdict().items():
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
      raise UserError(
        f"{path}: {role} is {chosen.dtype} of shape {chosen.shape}, not one vector of integers; "
        "run the experiment again"
      )
  return rows
