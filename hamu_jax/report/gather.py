"""Gathers run directories into studies, one for each dataset.

All information comes from config.json, summary.json and metrics.jsonl; names of folders and files are only
shown. Runs are grouped by every field of config.json in which they differ, except seeds. The runs of a group
differ only in their seeds, and means and standard deviations are over them.
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
  """Runs, and notes about those that are incomplete or damaged."""

  runs: list[Run]
  notes: list[str]


def gather(paths: Sequence[os.PathLike | str]) -> Gathered:
  """Reads all run directories at or below `paths`.

  A run directory is a folder with the config.json of a run. Damaged parts are left out and noted, such as
  a truncated last line of the metrics or a file that is not JSON. Of runs with the same configuration and
  seeds, the first finished one is kept, or the first one if none is finished.

  Args:
    paths: Folders to search.

  Returns:
    The runs in the order of `paths` and, within each, of their names.

  Raises:
    UserError: if a path does not exist, or no run is found.
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
      f"{', '.join(map(str, paths))}: no run directory there; give a folder with the config.json of a run"
      + "".join(f"; {note}" for note in notes[:1])
    )
  # Versions differ in their fields; a field that a run does not have is None.
  names = dict.fromkeys(name for run in runs for name in run.config)
  runs = [run._replace(config=dict.fromkeys(names) | run.config) for run in runs]
  return Gathered(without_repeats(runs, notes), notes)


def studies(runs: Sequence[Run]) -> list[Study]:
  """Arranges runs for tables and figures, one study for each dataset: means over several are meaningless.

  Args:
    runs: The runs of `gather`.
  """
  return [make_study(label, members) for label, members in datasets(runs).items()]


def datasets(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Groups runs by dataset, with a label for each.

  Runs are on the same dataset if their data have the same fingerprint, whatever their source. Runs of the
  same source, name and sizes are on the same dataset, too, if their fingerprints differ only because of the
  seeds of a subset or, for texts, the splits. An unfinished run, whose fingerprint is unknown, is on the
  dataset of any such run.
  """
  by_section = grouped(runs, lambda run: key_of(run.config, DATASET))
  # {node: representative of its dataset}; a node is a fingerprint, or a section with a single dataset.
  leader: dict[Any, Any] = {}

  def find(key):
    while leader.setdefault(key, key) != key:
      key = leader[key]
    return key

  def keys(section, run):
    """The nodes of a run's dataset: its fingerprint, and its section if that holds only one dataset."""
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
  """The values of the fields that choose the examples of a dataset."""
  if run.config["model.name"] == modalities.LANGUAGE_MODEL:
    return key_of(run.config, ["data.seed", *(name for name in run.config if name.startswith("text."))])
  subset = run.config["data.train_size"] or run.config["data.test_size"]
  return key_of(run.config, ["data.seed"] if subset else [])


def _label(run: Run) -> str:
  source, name, *others = DATASET
  words = [str(run.config[field]) for field in (source, name) if run.config[field]]
  words += [f"{field.removeprefix('data.')} {run.config[field]}" for field in others if run.config[field]]
  return ", ".join(words)


def _short_fingerprint(run: Run) -> str:
  return (run.fingerprint or "unknown")[:8]
