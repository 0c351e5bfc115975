"""Models from elsewhere: where they are, and that they can be used."""

import pathlib
from typing import Any

import jax
import numpy as np

from hamu_jax.errors import UserError
from hamu_jax.experiment.task import Task

Tree = Any


def find(path: str, name: str) -> str:
  """The file or folder of a model that is given by a path.

  Args:
    path: weights, a run directory, or RUN/MODEL without the ending of a file.
    name: model of a run directory.

  Returns:
    The path of the weights; `path` itself if nothing else is found.
  """
  folder = pathlib.Path(path)
  for each in (folder / f"{name}.safetensors", folder / name, folder.with_name(f"{folder.name}.safetensors")):
    if each.exists() and (folder.is_dir() or not folder.exists()):
      return str(each)
  return path


def read(task: Task, field: str, path: str, name: str) -> Tree:
  """Reads a model's variables.

  Args:
    task: data and model.
    field: name of the field or option that holds the path, for errors.
    path: its value, see `find`.
    name: see `find`.

  Raises:
    UserError: the weights belong to another model, cannot be read or are not finite; it names the field.
  """
  given = f"{field}={path!r}"
  try:
    variables = task.read_weights(find(path, name))
  except UserError as error:
    raise UserError(f"{given}: {error}") from error
  if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(variables))):
    raise UserError(f"{given}: holds NaN or infinite weights; give the weights of a model that has converged")
  return variables
