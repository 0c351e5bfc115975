"""Reads the metrics of a run directory, of which lines may be damaged."""

import json
import os
import pathlib
from typing import Any, NamedTuple

from hamu_jax import outside

_MOST_STEPS = 2**53


class MetricsLog(NamedTuple):
  """The contents of a metrics.jsonl."""

  rows: list[dict[str, Any]]
  torn: bool  # whether the last line is truncated; it is then not among the rows
  damaged: int = 0  # the number of other lines that are no rows


def read_metrics(path: os.PathLike | str) -> MetricsLog:
  """Reads the metrics of a run directory, of which some lines may be damaged and the last one truncated.

  Args:
    path: The run directory or its metrics.jsonl; without such a file there are no rows.

  Raises:
    UserError: if the file cannot be read.
  """
  path = pathlib.Path(path)
  path = path / "metrics.jsonl" if path.is_dir() else path
  lines = [""]
  if path.exists():
    with outside.read_of(path, "a text", "repair or delete it"):
      # Only a line feed ends a row: binary data have other line ends, too.
      lines = outside.text_of(path, errors="replace").split("\n")
  if not lines[-1]:
    lines.pop()
  rows = [_row(line) for line in lines]
  # What a killed process leaves is the beginning of a row.
  torn = bool(rows) and rows[-1] is None and lines[-1].startswith("{")
  return MetricsLog([row for row in rows if row is not None], torn, rows.count(None) - torn)


def _row(line: str) -> dict[str, Any] | None:
  """The row of metrics in a line, None if there is none."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < _MOST_STEPS:
    return None
  return row if all(isinstance(row.get(name), str) for name in ("stage", "split")) else None
