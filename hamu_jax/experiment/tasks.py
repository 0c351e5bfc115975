"""The table of tasks: the class that implements each modality."""

from collections.abc import Callable
from typing import Any

import ml_collections

from hamu_jax.config import modalities
from hamu_jax.experiment.task import Task
from hamu_jax.language.task import Language
from hamu_jax.vision.task import Vision

TASKS: dict[str, Callable[[Any], Task]] = {modalities.IMAGES: Vision, modalities.TEXTS: Language}


def make_task(config: ml_collections.ConfigDict) -> Task:
  """Loads the data and the model of a validated configuration.

  Raises:
    UserError: the data or the model is missing or wrong.
  """
  return TASKS[modalities.name_of(config)](config)


def register(
  name: str, make: Callable[[Any], Task], modality: modalities.Modality = modalities.Modality()
) -> None:
  """Adds a modality, which `config.modality` can then name.

  Args:
    name: name of the modality.
    make: (configuration) -> task.
    modality: fields that its configurations may hold.
  """
  TASKS[name] = make
  modalities.MODALITIES[name] = modality
