"""The tables of a study: results, timing, differences between its groups, and all runs."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from hamu_jax.report.fields import METHOD, grouped, in_words, key_of
from hamu_jax.report.study import Estimate, Group, Study, deviations, estimates
from hamu_jax.report.table import Number, Table, with_one_format


class _Column(NamedTuple):
  pattern: str  # pattern of names in the results; * matches one part of a name, such as a split
  title: str  # {} is replaced by the match of *
  scale: float = 1
  digits: int = 4


# The tables of results; a column is shown if a run has its values.
_TABLES = {
  ("results", "Results"): (
    _Column("tug_of_war", "tug of war"),
    _Column("distance.retain.accuracy", "retain distance %", 100, 2),
    _Column("distance.forget.accuracy", "forget distance %", 100, 2),
    _Column("suite.model_utility", "model utility"),
    _Column("suite.forget_quality", "forget quality"),
    _Column("retain.accuracy", "retain acc %", 100, 2),
    _Column("forget.accuracy", "forget acc %", 100, 2),
    _Column("test.accuracy", "test acc %", 100, 2),
    _Column("test_retain.accuracy", "kept test acc %", 100, 2),
    _Column("test_forget.accuracy", "forgotten test acc %", 100, 2),
    _Column("suite.retain.rouge", "retain ROUGE %", 100, 2),
    _Column("suite.forget.rouge", "forget ROUGE %", 100, 2),
    _Column("suite.watermark.forget_retain_auc", "watermark AUC"),
    _Column("forget_test_auc", "forget/test loss AUC"),
    _Column("membership.confidence", "unseen % MIA", 100, 2),
  ),
  ("losses", "Losses and attacks"): (
    _Column("*.loss", "{} loss"),
    _Column("*_auc", "{} AUC"),
    _Column("membership.*", "MIA {} %", 100, 2),
    _Column("tug_of_war_signed", "signed tug of war"),
  ),
  ("language", "Scores of generated and true answers"): (
    _Column("suite.*.rouge", "{} ROUGE %", 100, 2),
    _Column("suite.*.probability", "{} probability"),
    _Column("suite.*.truth_ratio", "{} truth ratio"),
    _Column("suite.truth_ratio_distance", "truth ratio distance"),
    _Column("suite.watermark.*", "watermark {}"),
  ),
}
_TIMING = (
  _Column("seconds.*", "{} s", digits=1),
  _Column("steps", "steps", digits=1),
  _Column("seconds_per_step", "s a step"),
  _Column("compile_seconds", "compile s", digits=1),
  _Column("evaluate_seconds", "evaluate s", digits=1),
  _Column("host_memory_gib", "host GiB", digits=2),
  _Column("device_memory_gib", "device GiB", digits=2),
  _Column("tokens_per_second", "tokens a s", digits=1),
)
_SPLITS = ("retain", "forget", "test", "test_retain", "test_forget")
_STAGES = ("memorization", "pretrain", "retrain", "mask", "unlearn")


def tables(study: Study) -> list[Table]:
  """Builds the tables of a study: results, timing, differing fields, and all runs.

  Args:
    study: A study of `gather.studies`.

  Returns:
    The tables that have rows, in the order in which to show them. The last, ``values``, has every number
    of the results under its name in summary.json.
  """
  rows = list(_model_rows(study))
  names = list(dict.fromkeys(name for _, group in rows for name in group.columns))
  header = (*_setting_header(study), "seeds")
  found = []
  for (name, title), columns in _TABLES.items():
    chosen = list(_matching(columns, names))
    if any(column in group.columns for column, *_ in chosen for _, group in rows):
      found.append(
        Table(
          name,
          title,
          (*header, *(title for _, title, _ in chosen)),
          tuple(
            (*settings, str(len(group.runs)), *_numbers(group.columns, chosen))
            for settings, group in rows
            if any(column in group.columns for column, *_ in chosen)
          ),
        )
      )
  found += [*_deviations(study), *_timing(study), *_settings(study), _runs(study)]
  if rows:
    every = [(name, name, _Column(name, name)) for name in sorted(names)]
    found.append(
      Table(
        "values",
        "All numbers of the results",
        (*header, *sorted(names)),
        tuple((*settings, str(len(group.runs)), *_numbers(group.columns, every)) for settings, group in rows),
      )
    )
  return [table._replace(rows=with_one_format(table.rows)) for table in found]


def _model_rows(study: Study) -> Iterator[tuple[tuple[str | None, ...], Group]]:
  """Yields the cells of the shown fields and the group, task by task, with the reference models first."""
  fields = study.task_fields
  for task, groups in study.by_task().items():
    references = [one for one in study.references if key_of(one.settings, fields) == task]
    for group in (*references, *groups):
      name = group.settings[METHOD] if group.model == "unlearned" else group.model
      yield (name, *(_setting(group, field) for field in study.shown[1:])), group


def _setting(group: Group, field: str) -> str | None:
  """The value of a field in words; None if the group's models do not depend on it."""
  if field not in group.settings or field in group.runs[0].unread:
    return None
  return in_words(group.settings[field])


def _setting_header(study: Study) -> tuple[str, ...]:
  return ("method", *(study.short(name) for name in study.shown[1:]))


def _matching(columns: Iterable[_Column], names: Sequence[str]) -> Iterator[tuple[str, str, _Column]]:
  """Yields name, title and column of the names that match, with splits and stages in their order."""
  for column in columns:
    pattern = re.compile(re.escape(column.pattern).replace(r"\*", "([^.]*)"))
    found = {name: match for name in names if (match := pattern.fullmatch(name))}
    for name in sorted(found, key=lambda name: _place(found[name].groups())):
      yield name, column.title.format(*(group.replace("_", " ") for group in found[name].groups())), column


def _place(parts: tuple[str, ...]) -> tuple[int, str]:
  """A sort key that puts splits and stages in their order, and other names after them."""
  order = (*_SPLITS, *_STAGES)
  word = parts[0] if parts else ""
  return (order.index(word) if word in order else len(order), word)


def _numbers(values: Mapping[str, Estimate], chosen) -> Iterator[Number | None]:
  for name, _, column in chosen:
    estimate = values.get(name)
    yield (
      None
      if estimate is None
      else Number(
        Estimate(column.scale * estimate.mean, column.scale * estimate.std, estimate.count),
        column.digits,
      )
    )


def _deviations(study: Study) -> Iterator[Table]:
  """The table of standard deviations due to each seed, if runs differ in several seeds."""
  by_group = [(group, deviations(group)) for group in study.groups]
  fields = dict.fromkeys(field for _, found in by_group for field in found)
  if len(fields) < 2:
    return
  names = list(dict.fromkeys(name for _, found in by_group for one in found.values() for name in one))
  chosen = list(_matching(_TABLES["results", "Results"], names))
  yield Table(
    "deviations",
    "Standard deviations by the seed that changes",
    (*_setting_header(study), "seed", *(title for _, title, _ in chosen)),
    tuple(
      (*(_setting(group, name) for name in study.shown), field, *_numbers(values, chosen))
      for group, found in by_group
      for field, values in found.items()
    ),
  )


def _timing(study: Study) -> Iterator[Table]:
  """The table of seconds, with a row for each group and device."""
  rows = []
  for group in study.groups:
    for device, runs in grouped(group.runs, lambda run: run.device).items():
      rows.append((group, device, len(runs), estimates(run.timing for run in runs)))
  chosen = list(_matching(_TIMING, list(dict.fromkeys(name for *_, values in rows for name in values))))
  if chosen:
    yield Table(
      "timing",
      "Timing; the seconds of stages include compiling and evaluation, those of a step do not",
      (*_setting_header(study), "device", "seeds", *(title for _, title, _ in chosen)),
      tuple(
        (
          *(_setting(group, name) for name in study.shown),
          device,
          str(count),
          *_numbers(values, chosen),
        )
        for group, device, count, values in rows
      ),
    )


def _settings(study: Study) -> Iterator[Table]:
  """The table of all differing fields, if the other tables do not show all of them."""
  if len(study.fields) > len(study.shown) and study.groups:
    yield Table(
      "settings",
      "Settings",
      ("method", *(study.short(name) for name in study.fields[1:])),
      tuple(tuple(_setting(group, name) for name in study.fields) for group in study.groups),
    )


def _runs(study: Study) -> Table:
  """The table of all runs, finished or not."""
  seeds = list(
    dict.fromkeys(name for run in study.runs for name, seed in run.seeds.items() if seed is not None)
  )
  rows = [
    (
      str(run.path),
      *(in_words(run.config[name]) for name in study.shown),
      *(in_words(run.config[name]) for name in seeds),
      run.status,
      run.summary.get("stop_reason", "") if run.summary else "",
      run.device,
    )
    for run in study.runs
  ]
  header = ("run", *_setting_header(study), *seeds, "status", "why it ended", "device")
  return Table("runs", "Runs", header, tuple(rows))
