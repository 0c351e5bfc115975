"""Common parts of all figures: colours, axes and files.

The colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

import io
import os
from collections.abc import Sequence

import numpy as np

from hamu_jax.run.rundir import write_bytes

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#7F7F7F"
# Largest number of names along an axis.
MAX_LABELS = 70
_MAX_NAME = 40


def edges(steps: np.ndarray) -> np.ndarray:
  """Edges [S + 1] of the cells around the steps [S], halfway between them."""
  if len(steps) == 1:
    return np.array([steps[0] - 0.5, steps[0] + 0.5])
  middles = (steps[:-1] + steps[1:]) / 2
  return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def held(values: np.ndarray) -> np.ndarray:
  """Values [S] as heights [S + 1] over `edges`, for drawing with step="post"."""
  return np.append(values, values[-1:])


def marker(steps: Sequence[int] | np.ndarray, marker: str = "o") -> str:
  """A marker for lines of few steps, which alone would show little or, for one step, nothing."""
  return marker if len(steps) <= 50 else ""


def short_names(names: Sequence[str]) -> list[str]:
  """Shortens dotted names: drops the first and last parts that all share, and truncates long names."""
  parts = [name.split(".") for name in names]
  shortest = min(map(len, parts))
  start = end = 0
  while start < shortest - 1 and len({part[start] for part in parts}) == 1:
    start += 1
  while end < shortest - 1 - start and len({part[-1 - end] for part in parts}) == 1:
    end += 1
  texts = [".".join(part[start : len(part) - end]) for part in parts]
  half = _MAX_NAME // 2
  return [t if len(t) <= _MAX_NAME else f"{t[: half - 1]}…{t[-half:]}" for t in texts]


def percent_limits(get_limits, set_limits, least: float) -> None:
  """Sets limits near [0, 100] that are at least `least` wide, so that rounding does not look like a trend."""
  low, high = get_limits()
  reach = max(high - low, least) / 2
  middle = (low + high) / 2
  # A band below 0 is for markers there; its size follows the width, so that no tick lies in it.
  band = min(4.0, 0.04 * 2 * reach)
  set_limits(max(middle - reach, -band), min(middle + reach, 104 if reach > 20 else 100.6))


def log_if_wide(axis) -> None:
  """Sets a log scale for positive values that span more than two orders of magnitude."""
  values = np.concatenate([np.ravel(line.get_ydata()) for line in axis.get_lines()] or [np.zeros(0)])
  values = values[np.isfinite(values)]
  if values.size and values.min() > 0 and values.max() > 100 * values.min():
    axis.set_yscale("log")


def whole_steps(axis, steps: Sequence[int] | np.ndarray) -> None:
  """Sets ticks at whole steps, even if there are few of them."""
  from matplotlib.ticker import MaxNLocator

  if steps[-1] - steps[0] < 8:
    axis.set_xticks(np.arange(steps[0], steps[-1] + 1))
  else:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def legend_below(axis, columns: int) -> None:
  """Puts the legend below the axes, where it hides nothing."""
  axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False, fontsize=9)


def message(axis, text: str) -> None:
  """Writes a text in place of a figure's content."""
  axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color=GREY)
  axis.set(xticks=(), yticks=())


def save(figure, *paths: os.PathLike | str) -> None:
  """Writes a figure to each path, in the format of the path's suffix.

  A figure that is made without pyplot draws with Agg and leaves no global state.
  """
  for path in [os.fspath(each) for each in paths]:
    kind = path.rpartition(".")[2]
    image = io.BytesIO()
    # Without the date, equal numbers give equal files.
    figure.savefig(image, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
    write_bytes(path, image.getvalue())
