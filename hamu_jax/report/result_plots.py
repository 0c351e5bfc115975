"""Figures of results: distances to the retrained model, the papers' trade-off, and results over a field."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hamu_jax.report import drawing, run_plots
from hamu_jax.report.fields import METHOD, grouped, is_task_field, key_of
from hamu_jax.report.sheet import Sheet, Styles, task_title
from hamu_jax.report.study import Group, Series, Study, sweeps


class _Metric(NamedTuple):
  name: str  # name in the results
  title: str
  scale: float = 1
  larger: bool = True  # whether larger is better


_RETAIN = _Metric("retain.accuracy", "retain accuracy (%)", 100)
_FORGET = _Metric("forget.accuracy", "forget accuracy (%)", 100, larger=False)
_TEST = _Metric("test.accuracy", "test accuracy (%)", 100)
_TUG_OF_WAR = _Metric("tug_of_war", "tug of war (1 is best)")
_RETAIN_ROUGE = _Metric("suite.retain.rouge", "retain ROUGE-L (%)", 100)
_FORGET_ROUGE = _Metric("suite.forget.rouge", "forget ROUGE-L (%)", 100, larger=False)
_UTILITY = _Metric("suite.model_utility", "model utility")
_QUALITY = _Metric("suite.forget_quality", "forget quality (p-value)")
_DISTANCES = tuple(
  _Metric(f"distance.{role}.accuracy", f"|{role} accuracy - retrained| (points)", 100, larger=False)
  for role in ("forget", "retain")
)
_ROUGE_DISTANCES = tuple(
  _Metric(f"distance.suite.{role}.rouge", f"|{role} ROUGE-L - retrained| (points)", 100, larger=False)
  for role in ("forget", "retain")
)
# Horizontal and vertical axis of each plane, and the metrics of the curves. Runs with generated answers use
# the language versions.
_DISTANCE_PLANES = (_DISTANCES,)
_LANGUAGE_DISTANCE_PLANES = (_ROUGE_DISTANCES, (_UTILITY, _QUALITY))
_PLANES = ((_FORGET, _RETAIN),)
_LANGUAGE_PLANES = ((_FORGET_ROUGE, _RETAIN_ROUGE),)
_CURVES = (_RETAIN, _FORGET, _TEST, _TUG_OF_WAR)
_LANGUAGE_CURVES = (_RETAIN_ROUGE, _FORGET_ROUGE, _UTILITY, _QUALITY)


def distances(study: Study):
  """Draws the distances of forget and retain accuracy to the retrained model's, with the Pareto fronts.

  The retrained model is at (0, 0). For language models with generated answers they are distances of ROUGE
  scores, and a second plane shows model utility against forget quality.
  """
  return _planes(study, "Distance to the retrained model", _DISTANCE_PLANES, _LANGUAGE_DISTANCE_PLANES, True)


def tradeoff(study: Study):
  """Draws retain over forget accuracy or ROUGE, the axes of HAMU's paper.

  The target is the retrained model's point, not a corner, so there are no fronts.
  """
  return _planes(study, "Retain-forget trade-off, the paper's axes", _PLANES, _LANGUAGE_PLANES, False)


def _planes(study: Study, title: str, plain, language, fronts: bool):
  """A panel for each task and pair of axes; None if no group has the metrics."""
  planes = _chosen(study, plain, language, lambda plane: plane)
  panels = [
    (groups, x, y)
    for groups in study.by_task().values()
    for x, y in planes
    if any(_shows(group, x, y) for group in groups)
  ]
  if not panels:
    return None
  columns = len(planes) if len(planes) > 1 else min(3, len(panels))
  sheet = Sheet(study, title, len(panels), columns, (5.6, 4.6))
  styles = Styles(study)
  for axis, (groups, x, y) in zip(sheet.axes, panels):
    sheet.name(axis, task_title(study, groups))
    axis.set(
      xlabel=_with_direction(x) if fronts else x.title, ylabel=_with_direction(y) if fronts else y.title
    )
    if fronts:
      _fronts(axis, groups, x, y, styles)
    for group in groups:
      if _shows(group, x, y):
        style = styles.of(group.settings)
        look = {"color": style.colour, "marker": style.marker, "markersize": 7, "label": style.label}
        _point(axis, group, x, y, zorder=4, **look)
    for reference in _references_of(study, groups):
      if _shows(reference, x, y):
        marker, colour, size = run_plots.REFERENCES[reference.model]
        look = {"color": colour, "marker": marker, "markersize": size**0.5, "label": reference.model}
        # The marker is larger and below, because a method that changes nothing lies on the original.
        _point(axis, reference, x, y, zorder=3, **look)
    if (x, y) in (_DISTANCES, _ROUGE_DISTANCES):
      marker, colour, size = run_plots.REFERENCES["retrained"]
      axis.plot(
        0, 0, marker, color=colour, markersize=size**0.5, markeredgecolor="black", label="retrained", zorder=3
      )
      axis.set(
        xlim=(-0.03 * max(axis.get_xlim()[1], 1), None), ylim=(-0.03 * max(axis.get_ylim()[1], 1), None)
      )
      axis.grid(alpha=0.3)
    else:
      _finish_plane(axis, x, y)
  return sheet.finish()


def curve(study: Study, field: str):
  """Draws results over one numeric field, e.g. the constraint or rho (``data.hard_probability``).

  There is one row per task and one column per metric; dotted lines are the retrained model.
  """
  series = sweeps(study).get(field, ())
  metrics = [
    metric
    for metric in _chosen(study, _CURVES, _LANGUAGE_CURVES, lambda metric: (metric,))
    if any(_shows(group, metric) for one in series for group in one.groups)
  ]
  if not series or not metrics:
    return None
  rest = [name for name in study.task_fields if name != field]
  rows = grouped(series, lambda one: key_of(one.settings, rest))
  sheet = Sheet(
    study, f"Results over {study.short(field)}", len(rows) * len(metrics), len(metrics), (4.2, 3.4)
  )
  styles = Styles(study, without=(field,))
  for row, members in enumerate(rows.values()):
    for axis, metric in zip(sheet.axes[row * len(metrics) :], metrics):
      for one in members:
        style = styles.of(one.settings)
        _curve(
          axis,
          one.x,
          one.groups,
          metric,
          color=style.colour,
          marker=style.marker,
          markersize=5,
          linestyle=style.line,
          label=style.label,
        )
      _retrained_curve(axis, study, field, members, metric)
      axis.set(xlabel=study.short(field), ylabel=metric.title)
      sheet.name(axis, study.title(members[0].settings, rest))
      xs = [x for one in members for x in one.x]
      if min(xs) > 0 and max(xs) > 100 * min(xs):
        axis.set_xscale("log")
      axis.margins(y=0.12)
      if metric.scale == 100:
        drawing.percent_limits(axis.get_ylim, axis.set_ylim, 5)
      axis.grid(alpha=0.3)
  return sheet.finish()


def pareto(points_Nx2: np.ndarray, *, larger: tuple[bool, bool]) -> np.ndarray:
  """Indices of the points on the Pareto front, sorted by the first coordinate.

  A point is on the front unless another is at least as good in both coordinates and better in one.

  Args:
    points_Nx2: Points; those with a NaN are never on the front.
    larger: Whether larger is better, for each coordinate.
  """
  points_Nx2 = np.asarray(points_Nx2, float).reshape(-1, 2)
  gain_Nx2 = np.where(larger, points_Nx2, -points_Nx2)
  at_least_NxN = (gain_Nx2[:, None] >= gain_Nx2[None]).all(-1)
  better_NxN = (gain_Nx2[:, None] > gain_Nx2[None]).any(-1)
  front = np.flatnonzero(~(at_least_NxN & better_NxN).any(0) & np.isfinite(points_Nx2).all(1))
  return front[np.lexsort(points_Nx2[front].T[::-1])]


def _chosen(study: Study, plain, language, metrics: Callable) -> Sequence[Any]:
  """The entries of `language` whose metrics the study has or, if there are none, `plain`."""
  names = {name for group in study.groups for name in group.columns}
  return [one for one in language if all(metric.name in names for metric in metrics(one))] or plain


def _with_direction(metric: _Metric) -> str:
  return f"{metric.title}, {'higher' if metric.larger else 'lower'} is better"


def _references_of(study: Study, groups: Sequence[Group]) -> Iterable[Group]:
  """The original and retrained models of a task's groups."""
  wanted = key_of(groups[0].settings, study.task_fields)
  return [one for one in study.references if key_of(one.settings, study.task_fields) == wanted]


def _shows(group: Group, *metrics: _Metric) -> bool:
  """Whether the group has finite means of all metrics; a group that diverged does not."""
  return bool(np.isfinite([_mean(group, metric) for metric in metrics]).all())


def _mean(group: Group, metric: _Metric) -> float:
  return metric.scale * group.columns[metric.name].mean if metric.name in group.columns else np.nan


def _spread(groups: Sequence[Group], metric: _Metric) -> list[float] | None:
  """Standard deviations, 0 for single seeds; None if all groups are single seeds."""
  spreads = [
    metric.scale * group.columns[metric.name].std if metric.name in group.columns else np.nan
    for group in groups
  ]
  return None if np.isnan(spreads).all() else np.nan_to_num(spreads).tolist()


def _point(axis, group: Group, x: _Metric, y: _Metric, **style) -> None:
  axis.errorbar(
    [_mean(group, x)],
    [_mean(group, y)],
    xerr=_spread([group], x),
    yerr=_spread([group], y),
    linestyle="none",
    elinewidth=1,
    markeredgecolor="black",
    markeredgewidth=0.6,
    **style,
  )


def _fronts(axis, groups: Sequence[Group], x: _Metric, y: _Metric, styles: Styles) -> None:
  """Draws the Pareto front as a staircase, of each method with several points and of all methods."""
  # Between two points of a front, the worse value of the two is attained.
  stairs = "steps-pre" if x.larger else "steps-post"
  by_method = grouped(groups, lambda group: group.settings[METHOD])
  for members in [*by_method.values(), groups]:
    points = np.array([[_mean(group, x), _mean(group, y)] for group in members])
    front = points[pareto(points, larger=(x.larger, y.larger))]
    if members is groups and len(by_method) > 1:
      axis.plot(
        *front.T,
        drawstyle=stairs,
        color="black",
        linestyle="--",
        linewidth=1.2,
        zorder=2,
        marker="o",
        markersize=13,
        markerfacecolor="none",
        label="Pareto front of all",
      )
    elif len(front) > 1:
      axis.plot(
        *front.T,
        drawstyle=stairs,
        color=styles.colour(members[0].settings),
        linewidth=1.2,
        alpha=0.6,
        zorder=1,
      )


def _finish_plane(axis, x: _Metric, y: _Metric) -> None:
  for metric, get, set_, scale, least in (
    (x, axis.get_xlim, axis.set_xlim, axis.set_xscale, 10),
    (y, axis.get_ylim, axis.set_ylim, axis.set_yscale, 5),
  ):
    if metric.scale == 100:
      drawing.percent_limits(get, set_, least)
      low, high = get()
      set_(low, high + 0.04 * (high - low))  # room for a large marker at 100%
    elif metric is _QUALITY:
      means = [line.get_ydata()[0] for line in axis.get_lines() if len(line.get_ydata()) == 1]
      if means and min(means) > 0 and max(means) > 100 * min(means):
        scale("log")
  axis.grid(alpha=0.3)


def _curve(axis, x: Sequence[float], groups: Sequence[Group], metric: _Metric, **style) -> None:
  means = [_mean(group, metric) for group in groups]
  axis.errorbar(x, means, yerr=_spread(groups, metric), linewidth=1.6, elinewidth=1, capsize=2, **style)


def _retrained_curve(axis, study, field: str, members: Sequence[Series], metric: _Metric) -> None:
  """Draws the retrained model's values: a level, or a curve if they depend on the field."""
  groups = [group for one in members for group in one.groups]
  fields = [name for name in study.fields if is_task_field(name)]
  wanted = {key_of(group.settings, fields) for group in groups}
  found = [
    one
    for one in study.references
    if one.model == "retrained" and _shows(one, metric) and key_of(one.settings, fields) in wanted
  ]
  style = {"color": "black", "linestyle": ":", "linewidth": 1.4, "label": "retrained"}
  if is_task_field(field):
    found = sorted(found, key=lambda one: one.settings[field])
    if found:
      axis.plot([one.settings[field] for one in found], [_mean(one, metric) for one in found], **style)
  elif len(found) == 1:
    axis.axhline(_mean(found[0], metric), **style)
