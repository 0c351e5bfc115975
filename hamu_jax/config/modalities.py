"""The kinds of experiments: what their examples are, and what their configurations may hold.

`images` and `texts` come with the package; `hamu_jax.experiment.tasks.register` adds others. A
configuration belongs to the modality that `config.modality` names; "auto" is texts where `model.name` is
`llama`, else images.
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_collections

AUTO, IMAGES, TEXTS = "auto", "images", "texts"
# `model.name` of all language models; `config.language` says which.
LANGUAGE_MODEL = "llama"


class Modality(NamedTuple):
  """What a configuration of a modality may hold.

  Attributes:
    reads: dotted names, without "config", of fields that it reads although the table of fields says that
      only other modalities do; of a section all.
    validate: (config) -> None, raises a UserError for what the modality cannot do.
  """

  reads: tuple[str, ...] = ()
  validate: Callable[[ml_collections.ConfigDict], None] = lambda config: None


# The two of the package are validated in `config.validation`.
MODALITIES: dict[str, Modality] = {IMAGES: Modality(), TEXTS: Modality()}


def name_of(config: ml_collections.ConfigDict) -> str:
  """The name of a configuration's modality."""
  if config.modality != AUTO:
    return config.modality
  return TEXTS if config.model.name == LANGUAGE_MODEL else IMAGES


def is_language(config: ml_collections.ConfigDict) -> bool:
  """Whether the experiment is on a language model."""
  return name_of(config) == TEXTS
