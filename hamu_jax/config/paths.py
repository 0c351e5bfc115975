"""Checks the files and folders that a configuration names, before anything is loaded."""

import re

import ml_collections

from hamu_jax.config.fields import FIELDS
from hamu_jax.config.kinds import Kind, OutputFolder, Path
from hamu_jax.config.readers import value_of

# Sources by what `data.path` is to them; one that is added to the tables checks its own.
_CACHED = ("tfds", "huggingface")
_LOCAL = ("parquet", "cifar10_binary", "tofu", "waterdrum", "question_answer", "text")


def check(config: ml_collections.ConfigDict, read: frozenset[str]) -> None:
  """Checks that what is read is there, and that what is written can be.

  Args:
    config: configuration whose fields have valid values.
    read: names of the fields that something reads.

  Raises:
    UserError: one line that names the field.
  """
  for name, field in FIELDS.items():
    kind: Kind = field.kind
    if re.fullmatch(r"data\.(\w+_set\.)?path", name):
      source = value_of(config, name.removesuffix("path") + "source") or config.data.source
      if source in _CACHED:
        kind = OutputFolder()
      elif source not in _LOCAL:
        continue
    if name in read and isinstance(kind, Path | OutputFolder):
      kind.check_there(f"config.{name}", value_of(config, name))


def check_workdir(workdir: str) -> None:
  """Raises a UserError unless a run directory can be written."""
  OutputFolder().check("--workdir", workdir)
  OutputFolder().check_there("--workdir", workdir)
