"""Figures of how hard a forget set is, from the report of `hamu_jax.analysis.hardness.analyse`.

Each is written as PNG and PDF. The colours are those of `hamu_jax.report.drawing`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hamu_jax.analysis import forecast
from hamu_jax.paired import Paired
from hamu_jax.report import drawing

_COLOURS = {"retain": drawing.BLUE, "forget": drawing.VERMILLION}
_METHODS = (drawing.BLUE, drawing.SKY, drawing.GREEN, drawing.ORANGE, drawing.PURPLE, drawing.GREY)
_MARKERS = ("o", "s", "^", "D", "v", "P")
# The largest constraint that a block can meet, and the largest that costs the other role nothing.
_LIMITS = {
  "feasible_ratio": ("feasible", drawing.VERMILLION, "s"),
  "free_ratio": ("without a loss", drawing.GREEN, "^"),
}


def short_names(names: Sequence[str]) -> list[str]:
  """Shortens tensor names, see `drawing.short_names`."""
  return drawing.short_names(names)


def draw(report: Mapping[str, Any], path: os.PathLike | str) -> None:
  """Draws the angles and feasible constraints of all blocks, and the changes by the first steps.

  Dots are the first batch pair; bars are one standard deviation around the mean of all pairs.

  Args:
    report: report of `hardness.analyse`.
    path: path of the figures, without .png and .pdf.

  Raises:
    UserError: if `path` cannot be written.
  """
  from matplotlib.figure import Figure

  blocks, options = report["blocks"], report["options"]
  by_tensor = options["scope"] == "tensor"
  height = max(6.4, 0.14 * min(len(blocks), drawing.MAX_LABELS) + 2)
  figure = Figure(figsize=(16, height), layout="constrained", dpi=120)
  word, _, _ = report["verdict"].partition(":")
  figure.suptitle(f"{report['method']} before its first step: {word}", fontsize=13)
  halves: Any = figure.subfigures(1, 2, width_ratios=(1.55, 1))
  left, right = halves
  if by_tensor:
    angles, ratios = left.subplots(1, 2, sharey=True, width_ratios=(1.2, 1))
    _ratios(ratios, blocks, options["constraint_ratio"])
  else:
    angles = left.subplots()
  _angles(angles, blocks, report["whole"])
  _name_blocks(angles, [block["name"] for block in blocks])
  for axis, role in zip(right.subplots(2, 1), Paired._fields):
    _changes(axis, report, role)
  drawing.save(figure, f"{os.fspath(path)}.png", f"{os.fspath(path)}.pdf")


def over(
  values: Sequence[float], reports: Sequence[Mapping[str, Any]], path: os.PathLike | str, *, field: str
) -> None:
  """Draws how hardness depends on one field, e.g. rho.

  Args:
    values: values of the field.
    reports: report of `hardness.analyse` for each value.
    path: path of the figures, without .png and .pdf.
    field: name of the field.

  Raises:
    UserError: if `path` cannot be written.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(14, 4.4), layout="constrained", dpi=120)
  figure.suptitle(f"Hardness over {field}: mean and standard deviation of the batch pairs", fontsize=13)
  angle, ratio, price = figure.subplots(1, 3)
  _curve(angle, values, [report["whole"]["angle"] for report in reports], drawing.PURPLE, "o", "whole model")
  angle.axhline(90, color=drawing.GREY, linewidth=0.8)
  angle.set(
    title="Angle between the gradients", ylabel="degrees", ylim=(0, 180), yticks=(0, 45, 90, 135, 180)
  )
  for name, (label, colour, marker) in _LIMITS.items():
    _curve(ratio, values, [report["limits"][name] for report in reports], colour, marker, label)
  asked = reports[0]["options"]["constraint_ratio"]
  ratio.axhline(asked, color="black", linestyle="--", linewidth=1.2, label="asked for")
  ratio.set(title="Largest constraint of all blocks", ylabel="constraint / learning rate")
  _log_if_wide(ratio.set_yscale, [asked, *(r["limits"][name]["mean"] for r in reports for name in _LIMITS)])
  for name, marker, colour in zip(reports[0]["steps"], _MARKERS, _METHODS):
    changes = [_price(report["steps"][name]) for report in reports]
    price.plot(values, changes, color=colour, marker=marker, markersize=5, linewidth=1.6, label=name)
  price.axhline(0, color=drawing.GREY, linewidth=0.8)
  price.set(title="Retain loss paid for the forget loss", ylabel="change of retain loss / of forget loss")
  for axis in (angle, ratio, price):
    axis.set_xlabel(field)
    axis.grid(alpha=0.3)
    drawing.legend_below(axis, 2)
  drawing.save(figure, f"{os.fspath(path)}.png", f"{os.fspath(path)}.pdf")


def calibration(titles: Sequence[str], reports: Sequence[Mapping[str, Any]], path: os.PathLike | str) -> None:
  """Draws the predicted against the actual changes by first steps, one panel per report.

  Args:
    titles: titles of the panels.
    reports: reports of `hardness.analyse`.
    path: path of the figures, without .png and .pdf.

  Raises:
    UserError: if `path` cannot be written.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(4.8 * len(reports), 4.9), layout="constrained", dpi=120)
  figure.suptitle("First steps: change of the losses in nats, predicted and happened", fontsize=13)
  for axis, title, report in zip(np.atleast_1d(figure.subplots(1, len(reports))), titles, reports):
    values = []
    for (name, step), marker in zip(report["steps"].items(), _MARKERS):
      for role, colour in _COLOURS.items():
        x, y = (step[role][kind]["mean"] for kind in ("predicted", "happened"))
        values += [x, y]
        axis.errorbar(
          x,
          y,
          xerr=step[role]["predicted"]["std"],
          yerr=step[role]["happened"]["std"],
          color=colour,
          marker=marker,
          markersize=7,
          linestyle="none",
          elinewidth=1,
          label=f"{role}, {name}",
        )
    reach = [min(values), max(values)]
    axis.plot(reach, reach, color=drawing.GREY, linewidth=1, zorder=0, label="as predicted")
    axis.set(title=title, xlabel="predicted", ylabel="happened")
    axis.grid(alpha=0.3)
  handles, labels = axis.get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
  drawing.save(figure, f"{os.fspath(path)}.png", f"{os.fspath(path)}.pdf")


def _name_blocks(axis, names) -> None:
  every = -(-len(names) // drawing.MAX_LABELS)
  size = float(np.clip(450 * every / len(names), 6, 9))
  axis.set_yticks(np.arange(0, len(names), every), short_names(names)[::every], fontsize=size)
  axis.set_ylim(len(names) - 0.4, -0.6)
  axis.tick_params(axis="y", length=0)


def _angles(axis, blocks, whole) -> None:
  places = np.arange(len(blocks))
  axis.axvspan(0, forecast.HARD, color=drawing.VERMILLION, alpha=0.1, linewidth=0)
  axis.axvspan(forecast.EASY, 180, color=drawing.GREEN, alpha=0.1, linewidth=0)
  means, _, spreads = _means([block["angle"] for block in blocks], places)
  axis.errorbar(means, places, xerr=spreads, linestyle="none", color=drawing.GREY, elinewidth=2.5, alpha=0.6)
  first = [block["angle"]["first"] for block in blocks]
  axis.plot(first, places, "o", color=drawing.BLUE, markersize=4, label="first pair")
  axis.axvline(whole["angle"]["first"], color="black", linestyle="--", linewidth=1.2, label="whole model")
  axis.set_title("Angle between retain and forget gradient", pad=22)
  axis.set(xlim=(0, 180), xticks=(0, 30, 60, 90, 120, 150, 180), xlabel="degrees: red hard, green easy")
  axis.grid(axis="x", alpha=0.3)
  _legend_above(axis)


def _ratios(axis, blocks, asked: float) -> None:
  places = np.arange(len(blocks))
  for field, (label, colour, marker) in _LIMITS.items():
    first = np.array([block[field]["first"] for block in blocks], float)
    axis.plot(first, places, marker, color=colour, markersize=4, label=label)
  axis.axvline(asked, color="black", linestyle="--", linewidth=1.2, label="asked for")
  _log_if_wide(axis.set_xscale, [asked, *(block[field]["first"] for block in blocks for field in _LIMITS)])
  axis.set(xlabel="constraint / learning rate")
  axis.set_title("Largest constraint", pad=22)
  axis.grid(axis="x", alpha=0.3)
  _legend_above(axis)


def _legend_above(axis) -> None:
  axis.legend(
    loc="lower center",
    bbox_to_anchor=(0.5, 1),
    ncols=3,
    frameon=False,
    fontsize=9,
    handlelength=1.5,
    columnspacing=1.2,
    borderaxespad=0.2,
  )


def _changes(axis, report, role: str) -> None:
  names = list(report["steps"])
  for offset, kind, colour in ((-0.2, "predicted", drawing.SKY), (0.2, "happened", _COLOURS[role])):
    of_steps = [report["steps"][name][role][kind] for name in names]
    means, places, spreads = _means(of_steps, np.arange(len(names)) + offset)
    axis.bar(
      places, means, 0.38, yerr=spreads, color=colour, label=kind, error_kw={"elinewidth": 1.2, "capsize": 3}
    )
  axis.axhline(0, color="black", linewidth=0.8)
  axis.set_xticks(
    range(len(names)),
    [
      name
      if report["steps"][name]["stop"]["first"] == "none"
      else f"{name}\nstops: {report['steps'][name]['stop']['first']}"
      for name in names
    ],
  )
  axis.set(title=f"Change of the {role} loss by a first step, mean of {report['pairs']} pairs", ylabel="nats")
  axis.grid(axis="y", alpha=0.3)
  axis.legend(loc="best", fontsize=9)


def _means(values, places):
  """Returns means, places and standard deviations; None instead of the last if there is only one pair."""
  spreads = [value["std"] for value in values]
  means = [np.nan if value["mean"] is None else value["mean"] for value in values]
  return means, places, None if None in spreads else spreads


def _curve(axis, x, values, colour, marker, label) -> None:
  means, places, spreads = _means(values, x)
  axis.errorbar(
    places,
    means,
    yerr=spreads,
    color=colour,
    marker=marker,
    markersize=5,
    linewidth=1.6,
    elinewidth=1,
    capsize=2,
    label=label,
  )


def _price(step) -> float:
  gained = step["forget"]["predicted"]["mean"]
  return step["retain"]["predicted"]["mean"] / gained if gained else np.nan


def _log_if_wide(set_scale, values) -> None:
  """Sets a logarithmic scale if the values differ much."""
  positive = [value for value in values if value]
  if positive and max(positive) > 20 * min(positive):
    set_scale("log")
