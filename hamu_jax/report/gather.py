"""Gathers run directories into comparisons: which runs belong together, their means and deviations.

Everything here comes from the numbers in config.json, summary.json and metrics.jsonl; the names of
folders and files are only shown. Runs are grouped by every field of config.json in which they differ,
seeds aside; the runs of a group differ in their seeds alone, and means and standard deviations are over
them.
"""

import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hamu_jax.config import default as config_lib
from hamu_jax.config import modalities
from hamu_jax.errors import UserError
from hamu_jax.report import run_plots
from hamu_jax.run import rundir

METHOD = "method.name"
_UNLEARNING_SEED = "method.seed"
# What identifies a dataset where the fingerprints of its contents are unknown or differ by a draw of rows.
_DATASET = (
  "data.source",
  "data.name",
  "data.subset",
  "data.test_split",
  "data.train_size",
  "data.test_size",
  "data.image_size",
  "data.label_key",
)
# Says where things are, not what they are.
_PLACES = ("data.path", *_DATASET)
# Sections of what happens after the original and the retrained model are there.
_AFTERWARDS = ("method", "mask", "sam", "pairing", "devices", "mesh")
_DIAGNOSTICS = ("angle", "branch")
_MODELS = ("original", "retrained", "unlearned")


class Run(NamedTuple):
  """What a run directory holds, as far as a comparison needs it."""

  path: pathlib.Path
  config: dict[str, Any]  # by dotted name; fields that config.json lacks have today's defaults
  summary: dict[str, Any] | None  # None: the run is unfinished
  reached: tuple[str, int] | None  # stage and step of the last metrics
  diagnostics: dict[str, tuple[np.ndarray, np.ndarray]]  # name -> steps [S], values [S, T]

  @property
  def fingerprint(self) -> str | None:
    """Of the data; None where the run did not get as far as saying it."""
    return self.summary and self.summary.get("provenance", {}).get("data_fingerprint")

  @property
  def status(self) -> str:
    """Finished, or unfinished with the stage and step it reached."""
    if self.summary is not None:
      return "finished"
    return "unfinished: {} step {}".format(*self.reached) if self.reached else "unfinished: no step yet"

  @property
  def seeds(self) -> dict[str, Any]:
    """Its seeds by dotted name."""
    return {name: value for name, value in self.config.items() if _is_seed(name)}

  def values(self, model: str) -> dict[str, float]:
    """Numbers of a model's results by dotted name; null, which is a number that was not finite, as NaN."""
    return dict(_numbers((self.summary or {}).get("results", {}).get(model, {})))

  @property
  def timing(self) -> dict[str, float]:
    """Seconds of each stage, steps of the last one, its seconds a step and, of texts, tokens a second."""
    if self.summary is None:
      return {}
    seconds = dict(_numbers(self.summary.get("seconds", {})))
    last = "unlearn" if "unlearn" in seconds else "retrain"
    found = {f"seconds.{stage}": value for stage, value in seconds.items()}
    steps = self.summary.get("steps")
    if steps is not None:
      found["steps"] = float(steps)
    if last in seconds:
      found["seconds"] = seconds[last]
      if steps:
        found["seconds_per_step"] = seconds[last] / steps
    work = dict(_numbers(self.summary.get("work", {}).get(last, {})))
    if "tokens_per_second" in work:
      found["tokens_per_second"] = work["tokens_per_second"]
    return found

  @property
  def device(self) -> str:
    """What it ran on, e.g. ``8 x TPU v4``, and how many models shared the last stage; empty if unknown."""
    provenance = (self.summary or {}).get("provenance", {})
    if "device" not in provenance:
      return ""
    shared = provenance.get("together", {}).get("unlearn", 1)
    device = f"{provenance.get('devices', 1)} x {provenance['device']}"
    return device if shared == 1 else f"{device}, {shared} models together"


class Gathered(NamedTuple):
  """Runs, and what is to be said about those that are not whole."""

  runs: list[Run]
  notes: list[str]


class Estimate(NamedTuple):
  """Mean and sample standard deviation over seeds."""

  mean: float
  std: float  # NaN for one value
  count: int


class Group(NamedTuple):
  """Finished runs that differ in their seeds alone, or the models that they started from."""

  settings: dict[str, Any]  # what distinguishes it, by dotted name
  runs: tuple[Run, ...]
  model: str = "unlearned"  # of ``results``

  @property
  def columns(self) -> dict[str, Estimate]:
    """Estimates of all results by dotted name."""
    return estimates(run.values(self.model) for run in self.runs)


def deviations(group: Group) -> dict[str, dict[str, Estimate]]:
  r"""How much of the spread comes from each seed: training, unlearning, evaluation, the draw of the data.

  .. math:: s_f^2 = \frac{\sum_c \sum_{i \in c} (x_i - \bar x_c)^2}{\sum_c (n_c - 1)}

  over the cells c of runs that agree in all seeds but f: the pooled sample variance when f alone changes.

  Args:
    group: Of a study.

  Returns:
    By seed field, for those that change within some cell: for each result s_f as the mean of an `Estimate`
    without a deviation of its own, of as many runs as are in such cells.
  """
  seeds = list(dict.fromkeys(name for run in group.runs for name in run.seeds))
  found = {}
  for field in seeds:
    others = [name for name in seeds if name != field]
    cells = [
      cell for cell in grouped(group.runs, lambda run: key_of(run.config, others)).values() if len(cell) > 1
    ]
    columns = [estimates(run.values(group.model) for run in cell) for cell in cells]
    names = dict.fromkeys(name for column in columns for name in column)
    if names:
      found[field] = {name: _pooled([column[name] for column in columns if name in column]) for name in names}
  return found


def _pooled(cells: Sequence[Estimate]) -> Estimate:
  freedom = [cell.count - 1 for cell in cells]
  squares = sum(free * cell.std**2 for free, cell in zip(freedom, cells) if free)
  count = sum(cell.count for cell in cells)
  return Estimate(math.sqrt(squares / sum(freedom)) if sum(freedom) else math.nan, math.nan, count)


class Study(NamedTuple):
  """Everything on one dataset."""

  label: str
  runs: tuple[Run, ...]  # also the unfinished ones
  fields: tuple[str, ...]  # in which the runs differ, the method first; seeds are not among them
  shown: tuple[str, ...]  # those of them that suffice to tell the groups apart
  groups: tuple[Group, ...]
  references: tuple[Group, ...]  # the original and the retrained models

  @property
  def problem_fields(self) -> tuple[str, ...]:
    """Those of the shown fields that say what is learnt and forgotten, not how it is forgotten."""
    return tuple(name for name in self.shown if is_problem(name))

  def problems(self) -> dict[tuple[str, ...], list[Group]]:
    """Groups by the values, as JSON, of `problem_fields`, in order of appearance."""
    return grouped(self.groups, lambda group: key_of(group.settings, self.problem_fields))

  def title(self, settings: Mapping[str, Any], fields: Iterable[str]) -> str:
    """Values in words, e.g. ``hamu-q, constraint_ratio 0.5``; the method goes without its name."""
    return ", ".join(
      text(settings[name]) if name == METHOD else f"{self.short(name)} {text(settings[name])}"
      for name in fields
      if name in settings
    )

  def options(self, method: str) -> tuple[str, ...]:
    """The shown fields, problems aside, in which a method's own groups differ."""
    own = [group for group in self.groups if group.settings[METHOD] == method]
    return tuple(
      name
      for name in self.shown
      if not is_problem(name) and len({key_of(group.settings, [name]) for group in own}) > 1
    )

  def short(self, field: str) -> str:
    """The name without ``data.`` or ``method.``, unless both sections have a field of that name."""
    section, _, name = field.partition(".")
    other = {"data": "method", "method": "data"}.get(section)
    return field if other is None or f"{other}.{name}" in self.fields else name


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
  folders = {}
  for path in map(pathlib.Path, paths):
    if not path.is_dir():
      raise UserError(f"{path}: no such folder; give run directories, or folders of them")
    for folder in _folders(path):
      folders.setdefault(folder.resolve(), folder)
  runs, notes = [], []
  for folder in folders.values():
    run = _read(folder, notes)
    if run is not None:
      runs.append(run)
  if not runs:
    raise UserError(
      f"{', '.join(map(str, paths))}: no run directory there (a folder with the config.json of a run)"
      + "".join(f"; {note}" for note in notes[:1])
    )
  return Gathered(_without_repeats(runs, notes), notes)


def datasets(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Runs by dataset, under a label of each.

  Runs are on the same dataset if their data have the same fingerprint, whatever their source. So are runs
  of the same source, name and sizes whose fingerprints differ because of other seeds of a subset or, for
  texts, other splits; and unfinished runs, whose fingerprint is unknown, with any such run.
  """
  by_section = grouped(runs, lambda run: key_of(run.config, _DATASET))
  leader = {}  # section, or (section, fingerprint) where it holds several datasets -> a representative

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
  found = {}
  for run in runs:
    found.setdefault(find(keys(key_of(run.config, _DATASET), run)[0]), []).append(run)
  labels = [_label(members[0]) for members in found.values()]
  return {
    label if labels.count(label) == 1 else f"{label}, data {_short_fingerprint(members[0])}": members
    for label, members in zip(labels, found.values())
  }


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
  return [_study(label, members) for label, members in found.items()]


def estimates(values: Iterable[Mapping[str, float]]) -> dict[str, Estimate]:
  """Mean and standard deviation of each name over the mappings that have it.

  A NaN makes its mean NaN: a seed that diverged is not left out in silence.
  """
  found = {}
  for mapping in values:
    for name, value in mapping.items():
      found.setdefault(name, []).append(value)
  return {
    name: Estimate(
      float(np.mean(numbers)), float(np.std(numbers, ddof=1)) if len(numbers) > 1 else math.nan, len(numbers)
    )
    for name, numbers in found.items()
  }


def pareto(points_Nx2: np.ndarray, *, larger: tuple[bool, bool]) -> np.ndarray:
  """Indices of the points that no other point beats, by the first coordinate.

  A point is beaten by one that is at least as good in both coordinates and better in one.

  Args:
    points_Nx2: Points; those with a NaN are never part of the front.
    larger: Whether larger is better, for each coordinate.
  """
  points_Nx2 = np.asarray(points_Nx2, float).reshape(-1, 2)
  gain_Nx2 = np.where(larger, points_Nx2, -points_Nx2)
  at_least_NxN = (gain_Nx2[:, None] >= gain_Nx2[None]).all(-1)
  better_NxN = (gain_Nx2[:, None] > gain_Nx2[None]).any(-1)
  front = np.flatnonzero(~(at_least_NxN & better_NxN).any(0) & np.isfinite(points_Nx2).all(1))
  return front[np.lexsort(points_Nx2[front].T[::-1])]


class Series(NamedTuple):
  """Groups that differ in one numeric field alone."""

  settings: dict[str, Any]  # the others
  x: tuple[float, ...]  # ascending
  groups: tuple[Group, ...]


def sweeps(study: Study) -> dict[str, list[Series]]:
  """For each numeric field, e.g. the constraint or rho, the series along which it alone varies."""
  found = {}
  for field in study.fields:
    numeric = [group for group in study.groups if _is_number(group.settings[field])]
    others = [name for name in study.fields if name != field]
    series = []
    for members in grouped(numeric, lambda group: key_of(group.settings, others)).values():
      members = sorted(members, key=lambda group: group.settings[field])
      if len(members) > 1:
        series.append(
          Series(
            {name: members[0].settings[name] for name in others},
            tuple(group.settings[field] for group in members),
            tuple(members),
          )
        )
    if series:
      found[field] = series
  return found


def over_steps(group: Group, name: str) -> tuple[np.ndarray, np.ndarray] | None:
  """A diagnostic of all tensors and seeds of a group at the steps that all its runs have.

  Args:
    group: Of a study.
    name: ``angle`` or ``branch``.

  Returns:
    Steps [S] and values [S, T], T the tensors of all seeds together; None without any.
  """
  columns = [run.diagnostics[name] for run in group.runs if name in run.diagnostics]
  if not columns:
    return None
  steps = functools.reduce(np.intersect1d, [steps for steps, _ in columns])
  if not len(steps):
    return None
  return steps, np.concatenate([values[np.isin(own, steps)] for own, values in columns], axis=1)


def is_problem(field: str) -> bool:
  """Whether a field says what is learnt and forgotten: what the original and retrained model depend on."""
  return field == "sam.train_rho" or field.split(".")[0] not in _AFTERWARDS


def text(value: Any) -> str:
  """A setting in words."""
  if value is None:
    return "none"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, list):
    return " ".join(map(text, value)) or "none"
  return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def key_of(config: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
  """Values as JSON, which can be compared and hashed; 1 and 1.0 are the same, an absent field is null."""
  return tuple(
    json.dumps(float(value) if _is_number(value) else value, sort_keys=True)
    for value in (config.get(name) for name in names)
  )


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
  """Items by their key, in order of appearance."""
  found = {}
  for item in items:
    found.setdefault(key(item), []).append(item)
  return found


# Reading


def _folders(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Folders with a config.json, in the order of their names."""
  for folder, below, files in os.walk(path):
    below.sort()
    if "config.json" in files:
      yield pathlib.Path(folder)


def _read(folder: pathlib.Path, notes: list[str]) -> Run | None:
  try:
    config = rundir.read_json(folder / "config.json")
  except (UserError, OSError) as error:
    notes.append(f"{_reason(error)} - left out")
    return None
  # A language model's folder has a config.json, too.
  if not isinstance(config, dict) or not all(isinstance(config.get(s), dict) for s in ("data", "method")):
    return None
  summary = None
  if (folder / "summary.json").exists():
    try:
      summary = rundir.read_json(folder / "summary.json")
      if not isinstance(summary, dict) or not isinstance(summary.get("results"), dict):
        raise UserError(f"{folder / 'summary.json'} has no results")
    except (UserError, OSError) as error:
      summary = None
      notes.append(f"{_reason(error)} - shown as unfinished")
  rows = _rows(folder, notes)
  steps = [row for row in rows if row["stage"] == "unlearn" and row["split"] == "step"]
  columns = {name: run_plots.column(steps, name) for name in _DIAGNOSTICS}
  fields = _defaults() | dict(rundir.fields(config))
  if fields["data.source"] == "digits":
    # They have no name; what is there is another source's, left as it was.
    fields["data.name"] = ""
  return Run(
    folder,
    fields,
    summary,
    (rows[-1]["stage"], rows[-1]["step"]) if rows else None,
    {name: column for name, column in columns.items() if column is not None},
  )


def _rows(folder: pathlib.Path, notes: list[str]) -> list[dict[str, Any]]:
  """Rows of metrics.jsonl up to the first line that is not whole."""
  path = folder / "metrics.jsonl"
  try:
    rows, torn = rundir.read_metrics(path)
  except (UserError, OSError) as error:
    notes.append(f"{_reason(error)} - its metrics are left out")
    return []
  if torn:
    notes.append(f"{path} is truncated: its {len(rows)} whole lines are used, the torn last one is not")
  whole = [row for row in rows if isinstance(row, dict) and row.keys() >= {"stage", "step", "split"}]
  if len(whole) < len(rows):
    notes.append(f"{path}: {len(rows) - len(whole)} lines are not rows of a run - left out")
  return whole


def _reason(error: Exception) -> str:
  return str(error).split(";")[0]


@functools.cache
def _defaults() -> dict[str, Any]:
  return dict(rundir.fields(rundir.jsonable(config_lib.default_config().to_dict())))


def _without_repeats(runs: list[Run], notes: list[str]) -> list[Run]:
  """One run for each configuration and seeds."""
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
        f"{', though other results' if differs else ''} - left out"
      )
    kept.append(first)
  return [run for run in runs if any(run is other for other in kept)]


def _identity(run: Run) -> tuple[Any, ...]:
  """Equal for runs that should have equal results."""
  places = _PLACES if run.fingerprint else ()
  names = [name for name in run.config if name not in places and not config_lib.is_incidental(name)]
  return run.fingerprint, key_of(run.config, names)


# Arranging


def _study(label: str, runs: Sequence[Run]) -> Study:
  finished = [run for run in runs if run.summary is not None]
  # Where nothing is finished yet, the runs are listed all the same.
  fields = _differing(finished or runs)
  by_settings = grouped(finished, lambda run: key_of(run.config, fields))
  groups = sorted(
    (
      Group({name: members[0].config[name] for name in fields}, tuple(members))
      for members in by_settings.values()
    ),
    key=lambda group: [_order(group.settings[name]) for name in _preferred(fields)],
  )
  return Study(
    label,
    tuple(runs),
    fields,
    _telling_apart(fields, finished or runs),
    tuple(groups),
    tuple(_references(finished, [name for name in fields if is_problem(name)])),
  )


def _differing(runs: Sequence[Run]) -> tuple[str, ...]:
  """The method, then all fields that differ between the runs and may change results, seeds aside."""
  names = dict.fromkeys(name for run in runs for name in run.config)
  differing = [
    name
    for name in names
    if name != METHOD
    and name not in _PLACES
    and not _is_seed(name)
    and not config_lib.is_incidental(name)
    and len({key_of(run.config, [name]) for run in runs}) > 1
  ]
  return (METHOD, *_preferred(differing))


def _preferred(fields: Sequence[str]) -> list[str]:
  """What is forgotten first, then the method and its constraint, then all other options."""
  first = (METHOD, "method.constraint_ratio", "method.constraint")
  return sorted(
    fields,
    key=lambda name: (
      not is_problem(name),
      first.index(name) if name in first else len(first),
      name.startswith("method"),
    ),
  )


def _telling_apart(fields: Sequence[str], runs: Sequence[Run]) -> tuple[str, ...]:
  """The method and as few other fields as tell all settings apart, dropping the least preferred first."""

  def counts(names):
    """Of all settings, and of problems, which the comparison of methods must not mix."""
    problems = [name for name in names if is_problem(name)]
    return tuple(len({key_of(run.config, part) for run in runs}) for part in (names, problems))

  kept = list(fields)
  for name in reversed(_preferred(fields)):
    rest = [other for other in kept if other != name]
    if name != METHOD and counts(rest) == counts(fields):
      kept = rest
  return tuple(kept)


def _references(runs: Sequence[Run], fields: Sequence[str]) -> Iterator[Group]:
  """The original and the retrained models, each seed's once, by the fields that they depend on."""
  for members in grouped(runs, lambda run: key_of(run.config, fields)).values():
    for model in ("original", "retrained"):
      having = [run for run in members if model in run.summary["results"]]
      # How it is unlearnt later is nothing to them.
      seeds = [name for name in members[0].seeds if name != _UNLEARNING_SEED]
      once = {key_of(run.config, seeds): run for run in reversed(having)}
      if once:
        settings = {name: members[0].config[name] for name in fields}
        yield Group(settings, tuple(reversed(once.values())), model)


def _draw(run: Run) -> tuple[str, ...]:
  """The fields that decide which rows of a dataset are there."""
  if run.config["model.name"] == modalities.LANGUAGE_MODEL:
    return key_of(run.config, ["data.seed", *(name for name in run.config if name.startswith("text."))])
  subset = run.config["data.train_size"] or run.config["data.test_size"]
  return key_of(run.config, ["data.seed"] if subset else [])


def _label(run: Run) -> str:
  source, name, *others = _DATASET
  words = [str(run.config[field]) for field in (source, name) if run.config[field]]
  words += [f"{field.removeprefix('data.')} {run.config[field]}" for field in others if run.config[field]]
  return ", ".join(words)


def _difference(first: Run, second: Run) -> str:
  for name in _DATASET:
    if first.config[name] != second.config[name]:
      return f"config.{name} is {first.config[name]!r} there and {second.config[name]!r} here"
  return f"data_fingerprint is {_short_fingerprint(first)} there and {_short_fingerprint(second)} here"


def _short_fingerprint(run: Run) -> str:
  return (run.fingerprint or "unknown")[:8]


def _is_seed(name: str) -> bool:
  return name.split(".")[-1] == "seed"


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(tree: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
  for name, value in tree.items() if isinstance(tree, Mapping) else ():
    if isinstance(value, Mapping):
      yield from _numbers(value, f"{prefix}{name}.")
    elif value is None or _is_number(value):
      yield f"{prefix}{name}", math.nan if value is None else float(value)


def _order(value: Any) -> tuple[int, float, str]:
  """Sorts numbers by size and before all else."""
  return (0, value, "") if _is_number(value) else (1, 0.0, text(value))
