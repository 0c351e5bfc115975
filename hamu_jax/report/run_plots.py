"""Figures of a single run: its retain-forget trade-off, and the alignment of its two gradients.

Both read the rows of metrics.jsonl (`hamu_jax.run.metrics_log`), in which null stands for a number
that was not finite. The colours are Okabe and Ito's, which colour-blind readers can tell apart; roles
differ in marker and line style, too.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hamu_jax.report import drawing
from hamu_jax.report.fields import is_number
from hamu_jax.transforms import BRANCHES

# Colour, marker and line style of each split.
_SPLITS = {
  "retain": (drawing.BLUE, "o", "-"),
  "forget": (drawing.VERMILLION, "s", "--"),
  "test": (drawing.GREEN, "^", "-."),
}
_LARGEST = sys.float_info.max
_BRANCH_COLOURS = (drawing.GREEN, drawing.BLUE, drawing.SKY, drawing.ORANGE, drawing.VERMILLION, "black")
REFERENCES = {"original": ("*", drawing.ORANGE, 260), "retrained": ("D", drawing.PURPLE, 90)}


def tradeoff(
  rows: Sequence[Mapping[str, Any]],
  path: os.PathLike | str,
  *,
  references: Mapping[str, Mapping[str, Any]] | None = None,
  stage: str = "unlearn",
  title: str = "",
) -> None:
  """Draws the trade-off of a run: retain against forget accuracy, and accuracy and loss over steps.

  Args:
    rows: Rows of metrics.jsonl; those of `stage` with split retain, forget or test are drawn.
    path: Path of the PNG file.
    references: ``results`` of summary.json; its original and retrained models are marked.
    stage: The stage to draw.
    title: Title of the figure, e.g. the method's name.

  Raises:
    UserError: if `path` cannot be written.
  """
  from matplotlib.figure import Figure

  series = {split: _evaluations(rows, stage, split) for split in _SPLITS}
  given = references or {}
  references = {name: given[name] for name in REFERENCES if name in given}
  for split, evaluations in series.items():
    # A run without evaluations on the way still begins at the original model and ends at the unlearned one.
    if evaluations and split in given.get("original", {}):
      evaluations.setdefault(0, given["original"][split])
  figure = Figure(figsize=(14, 4.6), layout="constrained", dpi=120)
  figure.suptitle(f"Retain-forget trade-off{': ' + title if title else ''}", fontsize=13)
  if not any(series.values()) and not references:
    drawing.message(figure.subplots(), "no evaluations in this run")
    return drawing.save(figure, path)
  plane, accuracy, loss = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
  _plane(plane, series, references)
  _over_steps(accuracy, series, references, "accuracy", 100)
  accuracy.set(title="Accuracy", xlabel="step", ylabel="accuracy (%)", ylim=(-4, 104))
  _over_steps(loss, series, references, "loss", 1)
  loss.set(title="Loss", xlabel="step", ylabel="cross-entropy (nats)")
  drawing.log_if_wide(loss)
  drawing.save(figure, path)


def alignment(
  rows: Sequence[Mapping[str, Any]],
  path: os.PathLike | str,
  *,
  names: Sequence[str] = (),
  stage: str = "unlearn",
  title: str = "",
) -> None:
  """Draws a run's per-step diagnostics: angles, branches, feasibility and the stopping margin.

  A panel is left out if the method does not have its values.

  Args:
    rows: Rows of metrics.jsonl; those of `stage` with split ``step`` are drawn.
    path: Path of the PNG file.
    names: Names of the tensors in tree-leaf order, see `hamu_jax.analysis.alignment.tensor_names`.
    stage: The stage to draw.
    title: Title of the figure, e.g. the method's name.

  Raises:
    UserError: if `path` cannot be written.
  """
  from matplotlib.figure import Figure

  rows = [row for row in rows if row["stage"] == stage and row["split"] == "step"]
  columns = {name: found for name in _PANELS if (found := column(rows, name)) is not None}
  angles = columns.get("angle")
  tensors = 1 if angles is None else angles[1].shape[1]
  width, height = 9, 2.6 * max(len(columns), 2) + 0.8
  if tensors > 1:
    width, height = 15, max(height, 0.12 * min(tensors, drawing.MAX_LABELS) + 1)
  figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
  figure.suptitle(f"Gradient alignment{': ' + title if title else ''}", fontsize=13)
  if not columns:
    drawing.message(figure.subplots(), "no per-step diagnostics in this run")
    return drawing.save(figure, path)
  right: Any = figure
  if angles is not None and tensors > 1:
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    left, right = halves
    _heat_map(left, left.subplots(), *angles, names)
  axes = np.atleast_1d(right.subplots(len(columns), 1, sharex=True))
  for axis, (name, (steps, values_SxT)) in zip(axes, columns.items()):
    _PANELS[name](axis, steps, values_SxT)
    axis.set_xlim(*drawing.edges(steps)[[0, -1]])
  axes[-1].set_xlabel("step")
  drawing.whole_steps(axes[-1], steps)
  drawing.save(figure, path)


def _evaluations(rows: Sequence[Mapping[str, Any]], stage: str, split: str) -> dict[int, Mapping[str, Any]]:
  """The evaluations of a split by step."""
  return {row["step"]: row for row in rows if (row["stage"], row["split"]) == (stage, split)}


def column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray] | None:
  """Steps [S] and values [S, T] of a diagnostic, with NaN for null; None if no row has it.

  Rows whose values are no numbers, or not as many as the first ones, are left out.
  """
  found = [(row["step"], numbers) for row in rows if (numbers := _numbers(row.get(name)))]
  found = [(step, numbers) for step, numbers in found if len(numbers) == len(found[0][1])]
  if not found:
    return None
  steps, values_SxT = zip(*found, strict=True)
  return np.array(steps), np.array(values_SxT, float)


def _numbers(value: Any) -> list[float | None]:
  """The numbers of a diagnostic, one for each tensor; [] if there are none."""
  values = value if isinstance(value, list) else [] if value is None else [value]
  # Larger ones are no numbers that a run writes, and NumPy cannot hold them.
  good = (item is None or (is_number(item) and not abs(item) > _LARGEST) for item in values)
  return values if all(good) else []


def _plane(axis, series, references) -> None:
  axis.set(title="Retain against forget", xlabel="forget accuracy (%)", ylabel="retain accuracy (%)")
  steps = sorted(series["retain"].keys() & series["forget"].keys())
  if steps:
    x, y = (
      [100 * _value(series[split][step], "accuracy") for step in steps] for split in ("forget", "retain")
    )
    axis.plot(x, y, color=drawing.GREY, linewidth=1, zorder=1)
    points = axis.scatter(x, y, c=steps, cmap="viridis", s=34, zorder=3, label="during the run")
    if len(steps) > 1:
      axis.figure.colorbar(points, ax=axis, pad=0.02).ax.set_title("step", fontsize=9)
    axis.scatter(
      x[-1:],
      y[-1:],
      s=200,
      facecolors="none",
      edgecolors="black",
      linewidths=1.6,
      zorder=4,
      label=f"end (step {steps[-1]})",
    )
  for name, result in references.items():
    marker, colour, size = REFERENCES[name]
    axis.scatter(
      *(100 * _value(result[split], "accuracy") for split in ("forget", "retain")),
      marker=marker,
      color=colour,
      s=size,
      edgecolors="black",
      linewidths=0.8,
      zorder=2,
      label="retrained (the target)" if name == "retrained" else name,
    )
  drawing.percent_limits(axis.get_xlim, axis.set_xlim, 10)
  drawing.percent_limits(axis.get_ylim, axis.set_ylim, 5)
  axis.grid(alpha=0.3)
  drawing.legend_below(axis, 2)


def _over_steps(axis, series, references, metric: str, scale: float) -> None:
  if not any(series.values()):
    return drawing.message(axis, "no evaluations in this run")
  for split, (colour, marker, line) in _SPLITS.items():
    if not series[split]:
      continue
    steps, evaluations = zip(*sorted(series[split].items()))
    values = [scale * _value(evaluation, metric) for evaluation in evaluations]
    axis.plot(
      steps,
      values,
      color=colour,
      linestyle=line,
      label=split,
      linewidth=1.8,
      markersize=5,
      marker=drawing.marker(steps, marker),
    )
  for split, result in references.get("retrained", {}).items():
    if split in _SPLITS:
      axis.axhline(scale * _value(result, metric), color=_SPLITS[split][0], linestyle=":", linewidth=1.2)
  if "retrained" in references:
    axis.plot([], [], color="black", linestyle=":", linewidth=1.2, label="retrained")
  axis.grid(alpha=0.3)
  drawing.whole_steps(axis, sorted(set().union(*series.values())))
  drawing.legend_below(axis, 4)


def _heat_map(figure, axis, steps, angles_SxT, names) -> None:
  count = angles_SxT.shape[1]
  names = drawing.short_names(names) if len(names) == count else [f"tensor {t}" for t in range(count)]
  colours = axis.pcolormesh(
    drawing.edges(steps), np.arange(count + 1), angles_SxT.T, cmap="PuOr", vmin=0, vmax=180, rasterized=True
  )
  axis.set_facecolor("lightgrey")
  every = -(-count // drawing.MAX_LABELS)
  size = float(np.clip(450 * every / count, 6, 9))
  axis.set_yticks(np.arange(0, count, every) + 0.5, names[::every], fontsize=size)
  axis.tick_params(axis="y", length=0)
  axis.invert_yaxis()
  axis.set(title="Angle between retain and forget gradient", xlabel="step")
  drawing.whole_steps(axis, steps)
  bar = figure.colorbar(colours, ax=axis, pad=0.02, ticks=(0, 45, 90, 135, 180))
  bar.ax.set_yticklabels(("0° parallel", "45°", "90° orthogonal", "135°", "180° opposed"))


def _mean_angle(axis, steps, angles_SxT) -> None:
  finite = np.ma.masked_invalid(angles_SxT)
  mean = finite.mean(axis=1).filled(np.nan)
  title = "Angle between the gradients of the whole model"
  if angles_SxT.shape[1] > 1:
    title = "Mean angle over tensors ± standard deviation"
    spread = finite.std(axis=1).filled(np.nan)
    low, high = np.clip(mean - spread, 0, 180), np.clip(mean + spread, 0, 180)
    axis.fill_between(
      drawing.edges(steps),
      drawing.held(low),
      drawing.held(high),
      step="post",
      color=drawing.BLUE,
      alpha=0.25,
      linewidth=0,
    )
  axis.plot(steps, mean, color=drawing.BLUE, marker=drawing.marker(steps), markersize=4)
  axis.axhline(90, color=drawing.GREY, linewidth=0.8)
  axis.set(title=title, ylabel="degrees", ylim=(0, 180), yticks=(0, 45, 90, 135, 180))
  axis.grid(alpha=0.3)


def branches(axis, steps, codes_SxT) -> None:
  """Draws the share of tensors in each branch of HAMU's update over the steps."""
  shares = [np.mean(codes_SxT == code, axis=1) for code in range(len(BRANCHES))]
  shown = [code for code, share in enumerate(shares) if share.any()]
  axis.stackplot(
    drawing.edges(steps),
    *[100 * drawing.held(shares[code]) for code in shown],
    step="post",
    linewidth=0,
    colors=[_BRANCH_COLOURS[code] for code in shown],
    labels=[BRANCHES[code].replace("_", " ") for code in shown],
  )
  axis.set_title("Branch of the update", pad=22)
  axis.set(ylabel="% of tensors", ylim=(0, 100))
  axis.legend(
    loc="lower center",
    bbox_to_anchor=(0.5, 1),
    ncols=len(shown),
    frameon=False,
    fontsize=9,
    handlelength=1,
    columnspacing=1.2,
    borderaxespad=0.2,
  )


def _feasibility(axis, steps, values_SxT) -> None:
  # A null stands for c / 0: no step of any length meets the constraint.
  largest = np.where(np.isnan(values_SxT), np.inf, values_SxT).max(axis=1)
  finite = np.isfinite(largest)
  title = "Largest feasibility ratio (infeasible above 1"
  axis.plot(
    steps, np.where(finite, largest, np.nan), color=drawing.BLUE, marker=drawing.marker(steps), markersize=4
  )
  axis.axhline(1, color=drawing.VERMILLION, linestyle="--", linewidth=1.2)
  drawing.log_if_wide(axis)
  if not finite.all():
    title += "; ▲ infinite"
    axis.plot(
      steps[~finite],
      np.full((~finite).sum(), 0.95),
      "^",
      color=drawing.VERMILLION,
      markersize=5,
      transform=axis.get_xaxis_transform(),
    )
  axis.margins(y=0.15)
  axis.set(title=title + ")", ylabel=r"$c\,/\,(|g_f|\,R)$")
  axis.grid(alpha=0.3)


def _stopping(axis, steps, values_SxT) -> None:
  axis.plot(steps, values_SxT[:, 0], color=drawing.BLUE, marker=drawing.marker(steps), markersize=4)
  axis.axhline(0, color=drawing.VERMILLION, linestyle="--", linewidth=1.2)
  axis.margins(y=0.15)
  axis.yaxis.set_major_formatter("{x:.2g}")
  axis.set(title="Aggregate stopping margin (criterion met above 0)", ylabel="nats")
  axis.grid(alpha=0.3)


# The function that draws each diagnostic, from top to bottom.
_PANELS = {
  "angle": _mean_angle,
  "branch": branches,
  "feasibility": _feasibility,
  "stopping_margin": _stopping,
}


def _value(evaluation: Mapping[str, Any], name: str) -> float:
  value = evaluation.get(name)
  return np.nan if value is None else value
