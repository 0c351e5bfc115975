"""Figures that compare runs: trade-off, curves over a setting, angles, branches, tug-of-war, timing.

Each function takes a study of `hamu_jax.report.gather` and returns a figure, or None where the study has
nothing to show in it. A row or panel of its own is drawn for each problem - other data forgotten, another
model - because methods compare only on one. Methods differ in colour, their other settings in marker
and line style. Points are means, bars standard deviations over seeds.
"""

import functools
import pathlib
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hamu_jax.report import drawing, gather, run_plots

# Without the orange and the purple of the original and the retrained model.
_COLOURS = (
  "#0072B2",
  "#D55E00",
  "#009E73",
  "#56B4E9",
  "#882255",
  "#999933",
  "#332288",
  "#F0E442",
  "#44AA99",
  "#661100",
  "#7F7F7F",
  "#AA4499",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h", "d")
_LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_SEEDS = "Means over seeds; error bars are their standard deviations."
_FRONTS = " Circled: what no other setting beats; thin lines are each method's own front."
_DOTS = " Dots are single seeds."
_ANGLES = (
  "Means over tensors and seeds, of the two gradients as the method combines them: where it descends the "
  "negative forget loss, 180 degrees minus the angle between the gradients of the losses."
)
_BRANCHES = "Of HAMU's update: shares among the tensors of all seeds."
_LEGEND_CHARACTERS = 13.5  # that fit in an inch of a legend


class Picture(NamedTuple):
  """A figure that was written as NAME.png and NAME.pdf."""

  name: str
  title: str
  caption: str


class _Metric(NamedTuple):
  name: str  # in the results
  title: str
  scale: float = 1
  larger: bool = True  # is better


_RETAIN = _Metric("retain.accuracy", "retain accuracy (%)", 100)
_FORGET = _Metric("forget.accuracy", "forget accuracy (%)", 100, larger=False)
_TEST = _Metric("test.accuracy", "test accuracy (%)", 100)
_TUG_OF_WAR = _Metric("tug_of_war", "tug of war (1 is best)")
_RETAIN_ROUGE = _Metric("suite.retain.rouge", "retain ROUGE-L (%)", 100)
_FORGET_ROUGE = _Metric("suite.forget.rouge", "forget ROUGE-L (%)", 100, larger=False)
_UTILITY = _Metric("suite.model_utility", "model utility")
_QUALITY = _Metric("suite.forget_quality", "forget quality (p-value)")
# Horizontal and vertical axis of each trade-off, and the measures that curves show: those of generated
# answers where there are any.
_PLANES = ((_FORGET, _RETAIN),)
_LANGUAGE_PLANES = ((_FORGET_ROUGE, _RETAIN_ROUGE), (_UTILITY, _QUALITY))
_CURVES = (_RETAIN, _FORGET, _TEST, _TUG_OF_WAR)
_LANGUAGE_CURVES = (_RETAIN_ROUGE, _FORGET_ROUGE, _UTILITY, _QUALITY)


def draw(study: gather.Study, folder: pathlib.Path) -> list[Picture]:
  """Writes every figure that the study has something to show in, as PNG and PDF.

  Args:
    study: To show.
    folder: To write to; it exists.

  Returns:
    What was written, in the order in which to show it.

  Raises:
    UserError: `folder` cannot be written.
  """
  figures = {"tradeoff": ("Retain-forget trade-off", _SEEDS + _FRONTS, tradeoff(study))}
  for field in gather.sweeps(study):
    name = study.short(field)
    figures[f"curve-{name.replace('.', '-')}"] = (f"Results over {name}", _SEEDS, curve(study, field))
  figures |= {
    "tug_of_war": ("Tug of war", _SEEDS + _DOTS, tug_of_war(study)),
    "angle": ("Angle between the gradients", _ANGLES, angle(study)),
    "branch": ("Branches of the update", _BRANCHES, branch(study)),
    "timing": ("Time to unlearn", _SEEDS + _DOTS, timing(study)),
  }
  pictures = []
  for name, (title, caption, figure) in figures.items():
    if figure is not None:
      drawing.save(figure, folder / f"{name}.png", folder / f"{name}.pdf")
      pictures.append(Picture(name, title, caption))
  return pictures


def tradeoff(study: gather.Study):
  """What is retained against what is forgotten, with the Pareto fronts of all methods and of each.

  Accuracies; for language models with generated answers ROUGE, and model utility against forget quality.
  """
  planes = _chosen(study, _PLANES, _LANGUAGE_PLANES, lambda plane: plane)
  panels = [
    (groups, x, y)
    for groups in study.problems().values()
    for x, y in planes
    if any(_shows(group, x, y) for group in groups)
  ]
  if not panels:
    return None
  columns = len(planes) if len(planes) > 1 else min(3, len(panels))
  sheet = _Sheet(study, "Retain-forget trade-off", len(panels), columns, (5.6, 4.6))
  styles = _Styles(study)
  for axis, (groups, x, y) in zip(sheet.axes, panels):
    sheet.name(axis, _problem(study, groups))
    axis.set(xlabel=_with_direction(x), ylabel=_with_direction(y))
    _fronts(axis, groups, x, y, styles)
    for group in groups:
      if _shows(group, x, y):
        style = styles.of(group.settings)
        _point(
          axis,
          group,
          x,
          y,
          color=style.colour,
          marker=style.marker,
          markersize=7,
          zorder=4,
          label=style.label,
        )
    for reference in _references_of(study, groups):
      if _shows(reference, x, y):
        marker, colour, size = run_plots.REFERENCES[reference.model]
        # Larger, and below: a method that changes nothing lies on the original.
        _point(
          axis,
          reference,
          x,
          y,
          color=colour,
          marker=marker,
          markersize=size**0.5,
          zorder=3,
          label=reference.model,
        )
    _finish_plane(axis, x, y)
  return sheet.finish()


def curve(study: gather.Study, field: str):
  """Results over one numeric setting, e.g. the constraint or rho (``data.hard_probability``).

  A row a problem, a column a measure; dotted lines are the retrained model.
  """
  series = gather.sweeps(study).get(field, ())
  metrics = [
    metric
    for metric in _chosen(study, _CURVES, _LANGUAGE_CURVES, lambda metric: (metric,))
    if any(_shows(group, metric) for one in series for group in one.groups)
  ]
  if not series or not metrics:
    return None
  rest = [name for name in study.problem_fields if name != field]
  rows = gather.grouped(series, lambda one: gather.key_of(one.settings, rest))
  sheet = _Sheet(
    study, f"Results over {study.short(field)}", len(rows) * len(metrics), len(metrics), (4.2, 3.4)
  )
  styles = _Styles(study, without=(field,))
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


def angle(study: gather.Study):
  """The angle between retain and forget gradient over steps, mean of all tensors and seeds.

  Of the gradients as a method combines them: one that descends the negative forget loss has 180 degrees
  minus the angle that another has.
  """
  panels = _with_diagnostic(study, "angle")
  if not panels:
    return None
  sheet = _Sheet(
    study, "Angle between the gradients that a method combines", len(panels), min(2, len(panels)), (6.4, 3.8)
  )
  styles = _Styles(study)
  for axis, members in zip(sheet.axes, panels):
    for group, (steps, angles_SxT) in members:
      style = styles.of(group.settings)
      mean = np.ma.masked_invalid(angles_SxT).mean(axis=1).filled(np.nan)
      axis.plot(
        steps,
        mean,
        color=style.colour,
        linestyle=style.line,
        label=style.label,
        marker=drawing.marker(steps, style.marker),
        markersize=4,
        linewidth=1.6,
      )
    axis.axhline(90, color=drawing.GREY, linewidth=0.8)
    sheet.name(axis, _problem(study, [group for group, _ in members]))
    every = functools.reduce(np.union1d, [steps for _, (steps, _) in members])
    axis.set(
      xlabel="step",
      ylabel="degrees",
      ylim=(0, 180),
      yticks=(0, 45, 90, 135, 180),
      xlim=drawing.edges(every)[[0, -1]],
    )
    axis.grid(alpha=0.3)
    drawing.whole_steps(axis, every)
  return sheet.finish()


def branch(study: gather.Study):
  """HAMU's branches over steps: their shares among the tensors of all seeds, a panel a setting."""
  panels = [member for members in _with_diagnostic(study, "branch") for member in members]
  if not panels:
    return None
  sheet = _Sheet(
    study,
    "Branches of the update, % of the tensors of all seeds",
    len(panels),
    min(3, len(panels)),
    (5.0, 2.9),
  )
  styles = _Styles(study)
  for axis, (group, (steps, codes_SxT)) in zip(sheet.axes, panels):
    run_plots.branches(axis, steps, codes_SxT)
    axis.get_legend().remove()
    sheet.name(axis, styles.label(group.settings), _problem(study, [group]))
    axis.set(xlabel="step", xlim=drawing.edges(steps)[[0, -1]])
    drawing.whole_steps(axis, steps)
  return sheet.finish()


def tug_of_war(study: gather.Study):
  """Closeness to the retrained model, a bar a setting; dots are the seeds."""
  return _bars(
    study,
    "Tug of war: closeness to the retrained model, 1 is best",
    (("tug of war", lambda run: run.values("unlearned").get("tug_of_war", np.nan)),),
  )


def timing(study: gather.Study):
  """Seconds of unlearning, compiling included, and seconds a step; dots are the seeds."""
  return _bars(
    study,
    "Time to unlearn, compiling included",
    (
      ("seconds", lambda run: run.timing.get("seconds", np.nan)),
      ("seconds a step", lambda run: run.timing.get("seconds_per_step", np.nan)),
    ),
  )


class _Style(NamedTuple):
  colour: str
  marker: str
  line: Any
  label: str


class _Styles:
  """Colour by method; marker and line style by the other settings that are not the problem's."""

  def __init__(self, study: gather.Study, without: Sequence[str] = ()):
    self._study = study
    self._rest = [
      name
      for name in study.shown
      if name not in without and name != gather.METHOD and not gather.is_problem(name)
    ]
    self._methods = list(dict.fromkeys(group.settings[gather.METHOD] for group in study.groups))
    self._combinations = list(
      gather.grouped(study.groups, lambda group: gather.key_of(group.settings, self._rest))
    )

  def colour(self, settings: Mapping[str, Any]) -> str:
    return _COLOURS[self._methods.index(settings[gather.METHOD]) % len(_COLOURS)]

  def of(self, settings: Mapping[str, Any]) -> _Style:
    place = self._combinations.index(gather.key_of(settings, self._rest))
    return _Style(
      self.colour(settings),
      _MARKERS[place % len(_MARKERS)],
      _LINES[place % len(_LINES)],
      self.label(settings),
    )

  def label(self, settings: Mapping[str, Any]) -> str:
    """The method, with what tells its settings apart."""
    method = settings[gather.METHOD]
    options = [name for name in self._study.options(method) if name in self._rest]
    return self._study.title(settings, (gather.METHOD, *options))


class _Sheet:
  """A figure of equal panels with one legend below."""

  def __init__(self, study: gather.Study, title: str, panels: int, columns: int, size: tuple[float, float]):
    from matplotlib.figure import Figure

    rows = -(-panels // columns)
    self._panel = size[0]
    self._width, self._height = max(size[0] * columns, 6.4), size[1] * rows + 0.7
    self.figure = Figure(figsize=(self._width, self._height), layout="constrained", dpi=120)
    self.figure.suptitle(
      "\n".join(_wrapped(line, self._width, 13) for line in (title, study.label)), fontsize=13
    )
    axes = np.ravel(self.figure.subplots(rows, columns, squeeze=False))
    for axis in axes[panels:]:
      axis.remove()
    self.axes = axes[:panels]

  def name(self, axis, *lines: str) -> None:
    """Gives a panel a title; empty lines are left out."""
    axis.set_title("\n".join(_wrapped(line, self._panel, 11) for line in lines if line), fontsize=11)

  def finish(self):
    """The figure, with a legend of what its panels show together."""
    handles = {}
    for axis in self.axes:
      for handle, label in zip(*axis.get_legend_handles_labels()):
        handles.setdefault(label, handle)
    if handles:
      longest = max(map(len, handles)) + 6
      columns = int(np.clip(self._width * _LEGEND_CHARACTERS / longest, 1, len(handles)))
      self.figure.set_size_inches(self._width, self._height + 0.2 * -(-len(handles) // columns))
      self.figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
      )
    return self.figure


def _wrapped(line: str, inches: float, size: float) -> str:
  """Broken at spaces where it would be wider; a character is about 0.6 of its size wide."""
  return textwrap.fill(line, int(inches * 72 / (0.6 * size)))


def _chosen(study: gather.Study, plain, language, metrics: Callable) -> Sequence[Any]:
  """What of `language` the study has, or else `plain`."""
  names = {name for group in study.groups for name in group.columns}
  return [one for one in language if all(metric.name in names for metric in metrics(one))] or plain


def _problem(study: gather.Study, groups: Sequence[gather.Group]) -> str:
  return study.title(groups[0].settings, study.problem_fields)


def _with_direction(metric: _Metric) -> str:
  return f"{metric.title}, {'higher' if metric.larger else 'lower'} is better"


def _references_of(study: gather.Study, groups: Sequence[gather.Group]) -> Iterable[gather.Group]:
  """The models that a problem's groups started from, and their retrained ones."""
  wanted = gather.key_of(groups[0].settings, study.problem_fields)
  return [one for one in study.references if gather.key_of(one.settings, study.problem_fields) == wanted]


def _shows(group: gather.Group, *metrics: _Metric) -> bool:
  """Whether the group has all of them; one that diverged has none."""
  return bool(np.isfinite([_mean(group, metric) for metric in metrics]).all())


def _mean(group: gather.Group, metric: _Metric) -> float:
  return metric.scale * group.columns[metric.name].mean if metric.name in group.columns else np.nan


def _spread(groups: Sequence[gather.Group], metric: _Metric) -> list[float] | None:
  """Standard deviations, 0 for single seeds; None where there is none at all."""
  spreads = [
    metric.scale * group.columns[metric.name].std if metric.name in group.columns else np.nan
    for group in groups
  ]
  return None if np.isnan(spreads).all() else np.nan_to_num(spreads).tolist()


def _point(axis, group: gather.Group, x: _Metric, y: _Metric, **style) -> None:
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


def _fronts(axis, groups: Sequence[gather.Group], x: _Metric, y: _Metric, styles: _Styles) -> None:
  """Stairs along what is reached: of each method with several settings, and of all."""
  # Between two points of a front the next best of them is what is reached.
  stairs = "steps-pre" if x.larger else "steps-post"
  by_method = gather.grouped(groups, lambda group: group.settings[gather.METHOD])
  for members in [*by_method.values(), groups]:
    points = np.array([[_mean(group, x), _mean(group, y)] for group in members])
    front = points[gather.pareto(points, larger=(x.larger, y.larger))]
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


def _curve(axis, x: Sequence[float], groups: Sequence[gather.Group], metric: _Metric, **style) -> None:
  means = [_mean(group, metric) for group in groups]
  axis.errorbar(x, means, yerr=_spread(groups, metric), linewidth=1.6, elinewidth=1, capsize=2, **style)


def _retrained_curve(axis, study, field: str, members: Sequence[gather.Series], metric: _Metric) -> None:
  """The retrained model's values: a level, or a curve where the setting changes it, too."""
  groups = [group for one in members for group in one.groups]
  fields = [name for name in study.fields if gather.is_problem(name)]
  wanted = {gather.key_of(group.settings, fields) for group in groups}
  found = [
    one
    for one in study.references
    if one.model == "retrained" and _shows(one, metric) and gather.key_of(one.settings, fields) in wanted
  ]
  style = {"color": "black", "linestyle": ":", "linewidth": 1.4, "label": "retrained"}
  if gather.is_problem(field):
    found = sorted(found, key=lambda one: one.settings[field])
    if found:
      axis.plot([one.settings[field] for one in found], [_mean(one, metric) for one in found], **style)
  elif len(found) == 1:
    axis.axhline(_mean(found[0], metric), **style)


def _with_diagnostic(study: gather.Study, name: str) -> list[list[tuple[gather.Group, Any]]]:
  """By problem: groups that have a diagnostic, with it."""
  problems = [
    [(group, found) for group in groups if (found := gather.over_steps(group, name)) is not None]
    for groups in study.problems().values()
  ]
  return [members for members in problems if members]


def _bars(study: gather.Study, title: str, measures: Sequence[tuple[str, Callable]]):
  """A panel a problem and measure, a bar a group."""
  problems = [
    groups
    for groups in study.problems().values()
    if any(np.isfinite(measure(run)) for group in groups for run in group.runs for _, measure in measures)
  ]
  if not problems:
    return None
  longest = max(map(len, problems))
  several = len(measures) > 1
  columns = len(measures) if several else min(2, len(problems))
  sheet = _Sheet(study, title, len(problems) * len(measures), columns, (6.2, 0.26 * longest + 1.2))
  styles = _Styles(study)
  panels = [(groups, *measure) for groups in problems for measure in measures]
  for axis, (groups, name, measure) in zip(sheet.axes, panels):
    axis.set_yticks(range(len(groups)), [styles.label(group.settings) for group in groups], fontsize=9)
    for place, group in enumerate(groups):
      values = [measure(run) for run in group.runs]
      estimate = gather.estimates({name: value} for value in values)[name]
      axis.barh(
        place,
        estimate.mean,
        height=0.7,
        color=styles.colour(group.settings),
        alpha=0.85,
        xerr=None if np.isnan(estimate.std) else estimate.std,
        error_kw={"elinewidth": 1.2, "capsize": 3},
      )
      if len(values) > 1:
        axis.plot(values, [place] * len(values), "o", color="black", markersize=3, alpha=0.7)
    axis.set(xlabel=name, ylim=(longest - 0.4, -0.6))
    axis.set_xlim(left=0)
    sheet.name(axis, _problem(study, groups))
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
  return sheet.finish()
