"""Checks what run directories hold, once, so that tables and figures can rely on it.

A run directory may be of another version, edited or damaged.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from hamu_jax.errors import UserError
from hamu_jax.report.fields import METHOD
from hamu_jax.run import rundir

# Fields whose values are texts in every version.
_TEXTS = (METHOD, "model.name", "data.source")
# Names of fields become names of files.
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_DEEPEST = 8
_LONGEST = 10_000


def config_of(folder: pathlib.Path) -> dict[str, Any] | None:
  """Reads the fields of a run's config.json by dotted name.

  Args:
    folder: folder with a config.json.

  Returns:
    The fields; None if the file is not that of a run, such as a language model's.

  Raises:
    UserError: if the file cannot be read, or a field is wrong.
  """
  path = folder / "config.json"
  config = rundir.read_json(path)
  if not all(isinstance(config.get(section), dict) for section in ("data", "method")):
    return None
  _check(path, config)
  fields = dict(rundir.fields(config))
  for name, value in fields.items():
    if not _NAME.fullmatch(name):
      raise UserError(f"{path}: {name[:40]!r} is no name of a field")
    if not _is_plain(value):
      raise UserError(f"{path}: {name} is no number, text or list of them")
  for name in _TEXTS:
    if not isinstance(fields.get(name, ""), str):
      raise UserError(f"{path}: {name} is {fields[name]!r} where a text is needed")
  return fields


def summary_of(folder: pathlib.Path) -> dict[str, Any] | None:
  """Reads the summary.json of a run.

  Args:
    folder: run directory.

  Returns:
    Its content; None without such a file.

  Raises:
    UserError: if the file cannot be read, or a value that comparisons use has another type than runs write.
  """
  path = folder / "summary.json"
  if not path.exists():
    return None
  summary = rundir.read_json(path)
  _check(path, summary)

  def need(name: str, value: Any, kinds: Any, words: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds):
      raise UserError(f"{path}: {name} is {str(value)[:40]!r} where {words} is needed; delete it")

  need("results", summary.get("results"), dict, "an object")
  for model, values in summary["results"].items():
    need(f"results.{model}", values, dict, "an object")
  for name in ("seconds", "work", "provenance"):
    need(name, summary.get(name, {}), dict, "an object")
  need("stop_reason", summary.get("stop_reason", ""), str, "a text")
  need("steps", summary.get("steps", 0), (int, float), "a number")
  provenance = summary.get("provenance", {})
  need("provenance.data_fingerprint", provenance.get("data_fingerprint", ""), str, "a text")
  need("provenance.stages", provenance.get("stages", {}), dict, "an object")
  need("provenance.together", provenance.get("together", {}), dict, "an object")
  return summary


def _check(path: pathlib.Path, value: Any, depth: int = 0) -> None:
  """Raises a UserError if values are nested too deeply, are not finite or too long."""
  if isinstance(value, Mapping | list):
    if depth == _DEEPEST:
      raise UserError(f"{path}: its values are nested too deeply")
    for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
      if isinstance(name, str) and len(name) > _LONGEST:
        raise UserError(f"{path}: a name is too long")
      _check(path, item, depth + 1)
  elif isinstance(value, str) and len(value) > _LONGEST:
    raise UserError(f"{path}: a text is too long")
  elif isinstance(value, (int, float)) and not abs(value) < math.inf:
    raise UserError(f"{path}: {value} is not JSON")
  elif isinstance(value, int) and abs(value) > 2**1000:
    raise UserError(f"{path}: a number is too large")


def _is_plain(value: Any) -> bool:
  """Whether a value is one that a field can have."""
  if isinstance(value, list):
    return all(map(_is_plain, value))
  return value is None or isinstance(value, (str, bool, int, float)) or value == {}
