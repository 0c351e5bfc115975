"""Gathers run directories into studies: which runs are on the same data, and belong together.

Everything here comes from the numbers in config.json, summary.json and metrics.jsonl; the names of
folders and files are only shown. Runs are grouped by every field of config.json in which they differ,
seeds aside; the runs of a group differ in their seeds alone, and means and standard deviations are over
them.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from hamu_jax.config import modalities
from hamu_jax.errors import UserError
from hamu_jax.report.fields import DATASET, grouped, key_of
from hamu_jax.report.runs import Run, read, run_folders, without_repeats
from hamu_jax.report.study import Study, make_study


class Gathered(NamedTuple):
  """Runs, and what is to be said about those that are not whole."""

  runs: list[Run]
  notes: list[str]


def gather(paths: Sequence[os.PathLike | str]) -> Gathered:
  """Reads all run directories at or below `paths`.

  A run directory is a folder whose config.json is that of a run. What is broken is left out and noted:
  a torn line at the end of the metrics, a file that is not JSON. Of runs with the same configuration and
  seeds the first, finished if one is, stands for all.

  Args:
    paths: Folders.

  Returns:
    The runs in the order of `paths` and, below, of their names.

  Raises:
    UserError: a path does not exist, or there is no run at all.
  """
  folders: dict[pathlib.Path, pathlib.Path] = {}
  for path in map(pathlib.Path, paths):
    if not path.is_dir():
      raise UserError(f"{path}: no such folder; give run directories, or folders of them")
    for folder in run_folders(path):
      folders.setdefault(folder.resolve(), folder)
  runs: list[Run] = []
  notes: list[str] = []
  for folder in folders.values():
    run = read(folder, notes)
    if run is not None:
      runs.append(run)
  if not runs:
    raise UserError(
      f"{', '.join(map(str, paths))}: no run directory there (a folder with the config.json of a run)"
      + "".join(f"; {note}" for note in notes[:1])
    )
  return Gathered(without_repeats(runs, notes), notes)


def studies(runs: Sequence[Run], *, by_dataset: bool = False) -> list[Study]:
  """Arranges runs for tables and figures, one study a dataset.

  Args:
    runs: Of `gather`.
    by_dataset: Whether several datasets are allowed.

  Raises:
    UserError: there are several, and they are not allowed; the line says in what they differ.
  """
  found = datasets(runs)
  if len(found) > 1 and not by_dataset:
    first, second = (members[0] for members in list(found.values())[:2])
    raise UserError(
      f"{first.path} and {second.path} are on different data: {_difference(first, second)}; means over "
      f"them would say nothing: report the {len(found)} datasets apart, or pass --by-dataset"
    )
  return [make_study(label, members) for label, members in found.items()]


def datasets(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Runs by dataset, under a label of each.

  Runs are on the same dataset if their data have the same fingerprint, whatever their source. So are runs
  of the same source, name and sizes whose fingerprints differ because of other seeds of a subset or, for
  texts, other splits; and unfinished runs, whose fingerprint is unknown, with any such run.
  """
  by_section = grouped(runs, lambda run: key_of(run.config, DATASET))
  # Section, or (section, fingerprint) where it holds several datasets -> a representative.
  leader: dict[Any, Any] = {}

  def find(key):
    while leader.setdefault(key, key) != key:
      key = leader[key]
    return key

  def keys(section, run):
    """The dataset of a run as nodes of a graph: its fingerprint, and its section if that is one dataset."""
    known = run.fingerprint or next(
      (
        other.fingerprint
        for other in by_section[section]
        if other.fingerprint and other.config["data.path"] == run.config["data.path"]
      ),
      None,
    )
    several = any(len(set(found)) > 1 for found in drawn[section].values())
    nodes = [("fingerprint", known)] if known else []
    return nodes if several and nodes else [*nodes, ("section", *section)]

  drawn = {
    section: {
      draw: [run.fingerprint for run in same if run.fingerprint]
      for draw, same in grouped(members, _draw).items()
    }
    for section, members in by_section.items()
  }
  for section, members in by_section.items():
    for run in members:
      first, *others = keys(section, run)
      for other in others:
        leader[find(other)] = find(first)
  found: dict[Any, list[Run]] = {}
  for run in runs:
    found.setdefault(find(keys(key_of(run.config, DATASET), run)[0]), []).append(run)
  labels = [_label(members[0]) for members in found.values()]
  return {
    label if labels.count(label) == 1 else f"{label}, data {_short_fingerprint(members[0])}": members
    for label, members in zip(labels, found.values())
  }


def _draw(run: Run) -> tuple[str, ...]:
  """The fields that decide which rows of a dataset are there."""
  if run.config["model.name"] == modalities.LANGUAGE_MODEL:
    return key_of(run.config, ["data.seed", *(name for name in run.config if name.startswith("text."))])
  subset = run.config["data.train_size"] or run.config["data.test_size"]
  return key_of(run.config, ["data.seed"] if subset else [])


def _label(run: Run) -> str:
  source, name, *others = DATASET
  words = [str(run.config[field]) for field in (source, name) if run.config[field]]
  words += [f"{field.removeprefix('data.')} {run.config[field]}" for field in others if run.config[field]]
  return ", ".join(words)


def _difference(first: Run, second: Run) -> str:
  for name in DATASET:
    if first.config[name] != second.config[name]:
      return f"config.{name} is {first.config[name]!r} there and {second.config[name]!r} here"
  return f"data_fingerprint is {_short_fingerprint(first)} there and {_short_fingerprint(second)} here"


def _short_fingerprint(run: Run) -> str:
  return (run.fingerprint or "unknown")[:8]
