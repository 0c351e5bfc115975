"""Reads from run directories the parts that a comparison needs.

All information comes from config.json, summary.json and metrics.jsonl; names of folders are only shown.
"""

import functools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from flax import traverse_util

from hamu_jax.config import default as config_lib
from hamu_jax.config import validation
from hamu_jax.config.fields import FIELDS
from hamu_jax.errors import UserError
from hamu_jax.report import description, run_plots
from hamu_jax.report.fields import PLACES, grouped, is_seed, key_of, numbers_of
from hamu_jax.run import rundir
from hamu_jax.run.metrics_log import read_metrics

_DIAGNOSTICS = ("angle", "branch")
# Results that are compared with the retrained model's.
_COMPARED = ("retain.accuracy", "forget.accuracy", "suite.retain.rouge", "suite.forget.rouge")
_MODELS = ("original", "retrained", "unlearned")


class Run(NamedTuple):
  """The parts of a run directory that a comparison needs."""

  path: pathlib.Path
  config: dict[str, Any]  # by dotted name; fields that config.json lacks have the current defaults
  summary: dict[str, Any] | None  # None if the run is unfinished
  reached: tuple[str, int] | None  # stage and step of the last metrics row
  diagnostics: dict[str, tuple[np.ndarray, np.ndarray]]  # name -> steps [S], values [S, T]
  unread: frozenset[str] = frozenset()  # fields that nothing reads, such as HAMU's for a baseline

  @property
  def fingerprint(self) -> str | None:
    """Fingerprint of the data; None if the run is unfinished."""
    return None if self.summary is None else self.summary.get("provenance", {}).get("data_fingerprint")

  @property
  def status(self) -> str:
    """ "finished", or "unfinished" with the stage and step that the run reached."""
    if self.summary is not None:
      return "finished"
    return "unfinished: {} step {}".format(*self.reached) if self.reached else "unfinished: no step yet"

  @property
  def seeds(self) -> dict[str, Any]:
    """Seeds of the run by dotted name."""
    return {name: value for name, value in self.config.items() if is_seed(name)}

  def values(self, model: str) -> dict[str, float]:
    """Numbers of a model's results by dotted name, with NaN for null, a number that was not finite.

    For models other than the retrained one, `distance.NAME` is the absolute difference to its value.
    """
    results = (self.summary or {}).get("results", {})
    values = dict(numbers_of(results.get(model, {})))
    if model != "retrained":
      best = dict(numbers_of(results.get("retrained", {})))
      values |= {
        f"distance.{name}": abs(values[name] - best[name])
        for name in _COMPARED
        if name in values and name in best
      }
    return values

  @property
  def timing(self) -> dict[str, float]:
    """Seconds of each stage; steps, seconds of a steady step, tokens a second and memory of the last one."""
    if self.summary is None:
      return {}
    seconds = dict(numbers_of(self.summary.get("seconds", {})))
    last = "unlearn" if "unlearn" in seconds else "retrain"
    found = {f"seconds.{stage}": value for stage, value in seconds.items()}
    if "unlearned" not in self.summary.get("results", {}):
      return found
    steps = self.summary.get("steps")
    if steps is not None:
      found["steps"] = float(steps)
    if last in seconds:
      found["seconds"] = seconds[last]
      if steps:
        # Runs of older versions did not measure steady steps.
        found["seconds_per_step"] = seconds[last] / steps
    timing = dict(numbers_of(self.summary.get("timing", {}).get(last, {})))
    found |= {name: timing[name] for name in ("compile_seconds", "evaluate_seconds") if name in timing}
    if timing.get("steady_steps"):
      found["seconds_per_step"] = timing["step_seconds"]
    if "host_memory_bytes" in timing:
      found["host_memory_gib"] = timing["host_memory_bytes"] / 2**30
    if "device_memory_bytes" in timing:
      found["device_memory_gib"] = timing["device_memory_bytes"] / 2**30
    work = dict(numbers_of(self.summary.get("work", {}).get(last, {})))
    if "tokens_per_second" in work:
      found["tokens_per_second"] = work["tokens_per_second"]
    return found

  @property
  def device(self) -> str:
    """The devices, e.g. ``8 x TPU v4``, and how many models shared the last stage; empty if unknown."""
    provenance = (self.summary or {}).get("provenance", {})
    if "device" not in provenance:
      return ""
    shared = provenance.get("together", {}).get("unlearn", 1)
    device = f"{provenance.get('devices', 1)} x {provenance['device']}"
    return device if shared == 1 else f"{device}, {shared} models together"


def run_folders(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the folders with a config.json, in the order of their names."""
  for folder, below, files in os.walk(path):
    below.sort()
    if "config.json" in files:
      yield pathlib.Path(folder)


def read(folder: pathlib.Path, notes: list[str]) -> Run | None:
  """Reads a run directory.

  Args:
    folder: A folder with a config.json.
    notes: List to which a line is appended for each damaged file.

  Returns:
    The run; None if config.json is damaged or not that of a run.
  """
  try:
    config = description.config_of(folder)
  except UserError as error:
    notes.append(f"{_reason(error)} - left out")
    return None
  if config is None:
    return None
  try:
    summary = description.summary_of(folder)
  except UserError as error:
    summary = None
    notes.append(f"{_reason(error)} - shown as unfinished")
  rows = _rows(folder, notes)
  steps = [row for row in rows if row["stage"] == "unlearn" and row["split"] == "step"]
  columns = {name: run_plots.column(steps, name) for name in _DIAGNOSTICS}
  fields = _defaults() | config
  if fields["data.source"] == "digits":
    # The digits have no name; the field still holds the default of another source.
    fields["data.name"] = ""
  return Run(
    folder,
    fields,
    summary,
    (rows[-1]["stage"], rows[-1]["step"]) if rows else None,
    {name: column for name, column in columns.items() if column is not None},
    _unread(fields),
  )


def without_repeats(runs: list[Run], notes: list[str]) -> list[Run]:
  """Keeps one run for each configuration and seeds, a finished one if there is any.

  Args:
    runs: All runs.
    notes: List to which a line is appended for each run that is left out.
  """
  kept = []
  for first, *others in grouped(runs, _identity).values():
    for run in others:
      if first.summary is None and run.summary is not None:
        first, run = run, first
      differs = run.summary is not None and any(
        str(run.values(model)) != str(first.values(model)) for model in _MODELS
      )
      notes.append(
        f"{run.path} has the configuration and seeds of {first.path}"
        f"{', but different results' if differs else ''} - left out"
      )
    kept.append(first)
  return [run for run in runs if any(run is other for other in kept)]


def _rows(folder: pathlib.Path, notes: list[str]) -> list[dict[str, Any]]:
  """Complete rows of metrics.jsonl."""
  path = folder / "metrics.jsonl"
  try:
    rows, torn, damaged = read_metrics(path)
  except UserError as error:
    notes.append(f"{_reason(error)} - its metrics are left out")
    return []
  if torn:
    notes.append(f"{path} is truncated: its {len(rows)} complete lines are used, the last one is not")
  if damaged:
    notes.append(f"{path}: {damaged} lines are not rows of a run - left out")
  return rows


def _unread(fields: Mapping[str, Any]) -> frozenset[str]:
  """The fields that nothing reads in this configuration; none if it is of a version that cannot be asked."""
  try:
    config = ml_collections.ConfigDict(traverse_util.unflatten_dict(fields, sep="."))
    return frozenset(name for name in FIELDS if not validation.is_read(config, name))
  except (AttributeError, KeyError, TypeError, ValueError):
    return frozenset()


def _reason(error: Exception) -> str:
  return str(error).split(";")[0]


@functools.cache
def _defaults() -> dict[str, Any]:
  return dict(rundir.fields(rundir.jsonable(config_lib.default_config().to_dict())))


def _identity(run: Run) -> tuple[Any, ...]:
  """A key that is equal for runs that should have equal results."""
  places = PLACES if run.fingerprint else ()
  names = [name for name in run.config if name not in places and not config_lib.is_incidental(name)]
  return run.fingerprint, key_of(run.config, names)
