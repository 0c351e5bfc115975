"""Modalities: what the examples of an experiment are, and what its configuration may hold.

`images` and `texts` come with the package; `hamu_jax.experiment.tasks.register` adds others. A
configuration belongs to the modality that `config.modality` names; "auto" is texts where `model.name` is
`llama`, else images.
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_collections

AUTO, IMAGES, TEXTS = "auto", "images", "texts"
# `model.name` of every language model; `config.language` selects the model.
LANGUAGE_MODEL = "llama"


class Modality(NamedTuple):
  """What a configuration of a modality may hold.

  Attributes:
    reads: dotted names, without "config", of fields or whole sections that it reads although the table of
      fields assigns them to other modalities.
    validate: (config) -> None; raises a UserError for what the modality does not support.
  """

  reads: tuple[str, ...] = ()
  validate: Callable[[ml_collections.ConfigDict], None] = lambda config: None


# `config.validation` validates these two itself.
MODALITIES: dict[str, Modality] = {IMAGES: Modality(), TEXTS: Modality()}


def name_of(config: ml_collections.ConfigDict) -> str:
  """The name of a configuration's modality."""
  if config.modality != AUTO:
    return config.modality
  return TEXTS if config.model.name == LANGUAGE_MODEL else IMAGES


def is_language(config: ml_collections.ConfigDict) -> bool:
  """Whether the experiment is on a language model."""
  return name_of(config) == TEXTS
