"""Studies: the runs on one dataset, in groups of runs that differ only in their seeds.

Runs are grouped by every field of config.json in which they differ, except seeds. Means and standard
deviations are over the runs of a group.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hamu_jax.config import default as config_lib
from hamu_jax.report.fields import (
  METHOD,
  PLACES,
  by_preference,
  grouped,
  in_words,
  is_number,
  is_seed,
  is_task_field,
  key_of,
  sort_key,
)
from hamu_jax.report.runs import Run

_UNLEARNING_SEED = "method.seed"


class Estimate(NamedTuple):
  """Mean and sample standard deviation over seeds."""

  mean: float
  std: float  # NaN for one value
  count: int  # type: ignore[assignment]  # tuples have a method of this name


class Group(NamedTuple):
  """Finished runs that differ only in their seeds, or their original or retrained models."""

  settings: dict[str, Any]  # values of the fields that distinguish groups, by dotted name
  runs: tuple[Run, ...]
  model: str = "unlearned"  # key of ``results``

  @property
  def columns(self) -> dict[str, Estimate]:
    """Estimates of all results by dotted name."""
    return estimates(run.values(self.model) for run in self.runs)


class Study(NamedTuple):
  """All runs on one dataset."""

  label: str
  runs: tuple[Run, ...]  # including unfinished ones
  fields: tuple[str, ...]  # fields in which the runs differ, the method first, without seeds
  shown: tuple[str, ...]  # those of `fields` that suffice to tell the groups apart
  groups: tuple[Group, ...]
  references: tuple[Group, ...]  # the original and the retrained models

  @property
  def task_fields(self) -> tuple[str, ...]:
    """The shown fields that define the task: what is learnt and forgotten, not how it is forgotten."""
    return tuple(name for name in self.shown if is_task_field(name))

  def by_task(self) -> dict[tuple[str, ...], list[Group]]:
    """Groups by the values, as JSON, of `task_fields`, in order of appearance."""
    return grouped(self.groups, lambda group: key_of(group.settings, self.task_fields))

  def title(self, settings: Mapping[str, Any], fields: Iterable[str]) -> str:
    """Values in words, e.g. ``hamu-q, constraint_ratio 0.5``; the method has no field name."""
    return ", ".join(
      in_words(settings[name]) if name == METHOD else f"{self.short(name)} {in_words(settings[name])}"
      for name in fields
      if name in settings
    )

  def options(self, method: str) -> tuple[str, ...]:
    """The shown fields, except those of the task, in which the groups of a method differ."""
    own = [group for group in self.groups if group.settings[METHOD] == method]
    return tuple(
      name
      for name in self.shown
      if not is_task_field(name) and len({key_of(group.settings, [name]) for group in own}) > 1
    )

  def short(self, field: str) -> str:
    """A field's name without ``data.`` or ``method.``, unless both sections have a field of that name."""
    section, _, name = field.partition(".")
    other = {"data": "method", "method": "data"}.get(section)
    return field if other is None or f"{other}.{name}" in self.fields else name


class Series(NamedTuple):
  """Groups that differ in only one numeric field."""

  settings: dict[str, Any]  # values of the other fields
  x: tuple[float, ...]  # values of the numeric field, ascending
  groups: tuple[Group, ...]


def make_study(label: str, runs: Sequence[Run]) -> Study:
  """Groups the runs on one dataset.

  Args:
    label: Label of the dataset.
    runs: At least one run, finished or not.
  """
  finished = [run for run in runs if run.summary is not None]
  # If no run is finished yet, the unfinished ones are listed.
  fields = _differing(finished or runs)
  by_settings = grouped(finished, lambda run: key_of(run.config, fields))
  groups = sorted(
    (
      Group({name: members[0].config[name] for name in fields}, tuple(members))
      for members in by_settings.values()
    ),
    key=lambda group: [sort_key(group.settings[name]) for name in by_preference(fields)],
  )
  return Study(
    label,
    tuple(runs),
    fields,
    _telling_apart(fields, finished or runs),
    tuple(groups),
    tuple(_references(finished, [name for name in fields if is_task_field(name)])),
  )


def estimates(values: Iterable[Mapping[str, float]]) -> dict[str, Estimate]:
  """Mean and standard deviation of each name over the mappings that have it.

  A NaN makes the mean NaN, so that a seed that diverged is not hidden.
  """
  found: dict[str, list[float]] = {}
  for mapping in values:
    for name, value in mapping.items():
      found.setdefault(name, []).append(value)
  return {
    name: Estimate(
      float(np.mean(numbers)), float(np.std(numbers, ddof=1)) if len(numbers) > 1 else math.nan, len(numbers)
    )
    for name, numbers in found.items()
  }


def deviations(group: Group) -> dict[str, dict[str, Estimate]]:
  r"""Standard deviation of the results due to each seed: of training, unlearning, evaluation or the data.

  .. math:: s_f^2 = \frac{\sum_c \sum_{i \in c} (x_i - \bar x_c)^2}{\sum_c (n_c - 1)}

  A cell c has the runs that agree in all seeds except f, so this is the pooled sample variance when only f
  changes.

  Args:
    group: A group of a study.

  Returns:
    {seed field: {result: `Estimate`}} for the seeds that change within a cell. The mean of an estimate is
    s_f, its standard deviation is NaN, and its count is the number of runs in such cells.
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


def sweeps(study: Study) -> dict[str, list[Series]]:
  """For each numeric field, e.g. the constraint or rho, the series in which only that field varies."""
  found = {}
  for field in study.fields:
    numeric = [group for group in study.groups if is_number(group.settings[field])]
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
    group: A group of a study.
    name: ``angle`` or ``branch``.

  Returns:
    Steps [S] and values [S, T], where T counts the tensors of all seeds; None if there are no values.
  """
  columns = [run.diagnostics[name] for run in group.runs if name in run.diagnostics]
  if not columns:
    return None
  steps = functools.reduce(np.intersect1d, [steps for steps, _ in columns])
  if not len(steps):
    return None
  return steps, np.concatenate([values[np.isin(own, steps)] for own, values in columns], axis=1)


def _differing(runs: Sequence[Run]) -> tuple[str, ...]:
  """The method, then all fields except seeds that differ between the runs and may change results."""
  names = dict.fromkeys(name for run in runs for name in run.config)
  differing = [
    name
    for name in names
    if name != METHOD
    and name not in PLACES
    and not is_seed(name)
    and not config_lib.is_incidental(name)
    and len({key_of(run.config, [name]) for run in runs}) > 1
  ]
  return (METHOD, *by_preference(differing))


def _telling_apart(fields: Sequence[str], runs: Sequence[Run]) -> tuple[str, ...]:
  """The method and few other fields that tell all groups apart; the least preferred are dropped first."""

  def counts(names):
    """Numbers of distinct groups and of distinct tasks, which a comparison must not mix."""
    task_fields = [name for name in names if is_task_field(name)]
    return tuple(len({key_of(run.config, part) for run in runs}) for part in (names, task_fields))

  kept = list(fields)
  for name in reversed(by_preference(fields)):
    rest = [other for other in kept if other != name]
    if name != METHOD and counts(rest) == counts(fields):
      kept = rest
  return tuple(kept)


def _references(runs: Sequence[Run], fields: Sequence[str]) -> Iterator[Group]:
  """Groups of the original and retrained models, one model per seed, by the fields that they depend on."""
  for members in grouped(runs, lambda run: key_of(run.config, fields)).values():
    for model in ("original", "retrained"):
      having = [run for run in members if model in run.summary["results"]]
      # These models do not depend on the seed of unlearning.
      seeds = [name for name in members[0].seeds if name != _UNLEARNING_SEED]
      once = {key_of(run.config, seeds): run for run in reversed(having)}
      if once:
        settings = {name: members[0].config[name] for name in fields}
        yield Group(settings, tuple(reversed(once.values())), model)


def _pooled(cells: Sequence[Estimate]) -> Estimate:
  freedom = [cell.count - 1 for cell in cells]
  squares = sum(free * cell.std**2 for free, cell in zip(freedom, cells) if free)
  count = sum(cell.count for cell in cells)
  return Estimate(math.sqrt(squares / sum(freedom)) if sum(freedom) else math.nan, math.nan, count)
