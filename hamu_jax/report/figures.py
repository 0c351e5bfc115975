"""Figures that compare runs: trade-off, curves over a field, angles, branches, tug-of-war, timing.

Each function takes a study of `hamu_jax.report.study` and returns a figure, or None if the study has
nothing to show in it. Each task (a forget set and a model) gets a row or panel of its own, because methods
are comparable only on one task. Colours distinguish methods; markers and line styles distinguish their
hyperparameters. Points are means over seeds, and bars are standard deviations.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hamu_jax.engine import methods
from hamu_jax.report import drawing, run_plots
from hamu_jax.report.fields import METHOD
from hamu_jax.report.result_plots import curve, distances, tradeoff
from hamu_jax.report.runs import Run
from hamu_jax.report.sheet import Sheet, Styles, task_title
from hamu_jax.report.study import Group, Study, estimates, over_steps, sweeps

_SEEDS = "Means over seeds; error bars are their standard deviations."
_FRONTS = " Circles mark the Pareto front of all methods; thin lines are each method's own front."
_TARGET = " The retrained model is the target: a method with a lower forget accuracy forgets too much."
_DOTS = " Dots are single seeds."
_ANGLES = (
  "Means over tensors and seeds of the angle between the gradients of the retain and the forget loss. Below "
  "90 degrees the roles conflict, because the forget loss is to rise."
)
_BRANCHES = "Branches of HAMU's update: shares among the tensors of all seeds."


class Picture(NamedTuple):
  """A figure that was written as NAME.png and NAME.pdf."""

  name: str
  title: str
  caption: str


def draw(study: Study, folder: pathlib.Path) -> list[Picture]:
  """Writes every figure for which the study has data, as PNG and PDF.

  Args:
    study: The study to show.
    folder: The folder to write to; it must exist.

  Returns:
    The written pictures, in the order in which to show them.

  Raises:
    UserError: if `folder` cannot be written.
  """
  figures = {
    "distances": ("Distance to the retrained model", _SEEDS + _FRONTS, distances(study)),
    "tradeoff": ("Retain-forget trade-off, the paper's axes", _SEEDS + _TARGET, tradeoff(study)),
  }
  for field in sweeps(study):
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


def angle(study: Study):
  """Draws the angle between the gradients of both losses over steps, the mean of all tensors and seeds.

  Runs store the angle of the gradients that a method combines. For a method that descends the negative forget
  loss, that is 180 degrees minus the angle of the losses' gradients.
  """
  panels = _with_diagnostic(study, "angle")
  if not panels:
    return None
  sheet = Sheet(
    study, "Angle between the gradients of the losses", len(panels), min(2, len(panels)), (6.4, 3.8)
  )
  styles = Styles(study)
  for axis, members in zip(sheet.axes, panels):
    for group, (steps, angles_SxT) in members:
      style = styles.of(group.settings)
      mean = np.ma.masked_invalid(angles_SxT).mean(axis=1).filled(np.nan)
      if _descends_negative_forget_loss(group.runs[0]):
        mean = 180 - mean
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
    sheet.name(axis, task_title(study, [group for group, _ in members]))
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


def _descends_negative_forget_loss(run: Run) -> bool:
  """Whether a run's method hands the gradient of the negative forget loss to its transform."""
  method = methods.METHODS.get(run.config[METHOD])
  options = {
    name.partition(".")[2]: value for name, value in run.config.items() if name.startswith("method.")
  }
  for substep in method.substeps if method else ():
    if substep.retain and substep.forget:
      return sum(map(float, substep.coefficients(options, 0).forget.values())) < 0
  return False


def branch(study: Study):
  """Draws HAMU's branches over steps: their shares among the tensors of all seeds, one panel per group."""
  panels = [member for members in _with_diagnostic(study, "branch") for member in members]
  if not panels:
    return None
  sheet = Sheet(
    study,
    "Branches of the update, % of the tensors of all seeds",
    len(panels),
    min(3, len(panels)),
    (5.0, 2.9),
  )
  styles = Styles(study)
  for axis, (group, (steps, codes_SxT)) in zip(sheet.axes, panels):
    run_plots.branches(axis, steps, codes_SxT)
    axis.get_legend().remove()
    sheet.name(axis, styles.label(group.settings), task_title(study, [group]))
    axis.set(xlabel="step", xlim=drawing.edges(steps)[[0, -1]])
    drawing.whole_steps(axis, steps)
  return sheet.finish()


def tug_of_war(study: Study):
  """Draws the closeness to the retrained model, one bar per group; dots are the seeds."""
  return _bars(
    study,
    "Tug of war: closeness to the retrained model, 1 is best",
    (("tug of war", lambda run: run.values("unlearned").get("tug_of_war", np.nan)),),
  )


def timing(study: Study):
  """Draws the seconds of unlearning, all included, and of a steady step; dots are the seeds."""
  return _bars(
    study,
    "Time to unlearn",
    (
      ("seconds, compiling and evaluation included", lambda run: run.timing.get("seconds", np.nan)),
      ("seconds of a steady step", lambda run: run.timing.get("seconds_per_step", np.nan)),
    ),
  )


def _with_diagnostic(study: Study, name: str) -> list[list[tuple[Group, Any]]]:
  """For each task, the groups that have a diagnostic, with its values."""
  tasks = [
    [(group, found) for group in groups if (found := over_steps(group, name)) is not None]
    for groups in study.by_task().values()
  ]
  return [members for members in tasks if members]


def _bars(study: Study, title: str, measures: Sequence[tuple[str, Callable]]):
  """Draws one panel per task and measure, with one bar per group."""
  tasks = [
    groups
    for groups in study.by_task().values()
    if any(np.isfinite(measure(run)) for group in groups for run in group.runs for _, measure in measures)
  ]
  if not tasks:
    return None
  longest = max(map(len, tasks))
  several = len(measures) > 1
  columns = len(measures) if several else min(2, len(tasks))
  sheet = Sheet(study, title, len(tasks) * len(measures), columns, (6.2, 0.26 * longest + 1.2))
  styles = Styles(study)
  panels = [(groups, *measure) for groups in tasks for measure in measures]
  for axis, (groups, name, measure) in zip(sheet.axes, panels):
    axis.set_yticks(range(len(groups)), [styles.label(group.settings) for group in groups], fontsize=9)
    for place, group in enumerate(groups):
      values = [measure(run) for run in group.runs]
      estimate = estimates({name: value} for value in values)[name]
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
    sheet.name(axis, task_title(study, groups))
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
  return sheet.finish()
