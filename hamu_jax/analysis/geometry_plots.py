"""Figures of a model's geometry: a map of its features, and the loss around it.

Each is written as PNG and PDF. The colours are those of `hamu_jax.report.drawing`. Retain and forget differ
in marker, too, and losses are shown in viridis, whose lightness alone tells low from high.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hamu_jax.paired import Paired
from hamu_jax.report import drawing

_RETAIN, _FORGET = "#0072B2", "#D55E00"
_LEVELS = 12
# More class names than that would fill the figure.
_NAMED_CLASSES = 20
# Losses whose ratio exceeds _WIDE are drawn on a logarithmic scale. The scale starts at _LEAST_LOSS;
# otherwise a few points with a loss near 0 would take most of the colours.
_WIDE = 100
_LEAST_LOSS = 1e-3


def umap(places: Mapping[str, Paired], labels: Paired, path: os.PathLike | str) -> None:
  """Draws the retain and forget features of several models, one panel per model, on common axes.

  Colours are classes; forget examples are outlined crosses.

  Args:
    places: {title of the panel: Paired [N, 2] positions}.
    labels: Paired [N] class numbers, the same for all models.
    path: Path of the figures, without .png and .pdf.

  Raises:
    UserError: if `path` cannot be written.
  """
  from matplotlib.figure import Figure
  from matplotlib.lines import Line2D

  classes = np.unique(np.concatenate(labels)).tolist()
  colour = _class_colours(classes)
  colours = Paired(*([colour[label] for label in role.tolist()] for role in labels))
  figure = Figure(figsize=(5.2 * len(places), 5.8), layout="constrained", dpi=120)
  figure.suptitle("UMAP of the features, all models embedded together", fontsize=13)
  axes = np.atleast_1d(figure.subplots(1, len(places), sharex=True, sharey=True))
  for axis, (title, sets) in zip(axes, places.items()):
    # Few points get large marks; many points get small ones, so that they do not cover each other.
    size = float(np.clip(8000 / sum(map(len, sets)), 4, 40))
    axis.scatter(*sets.retain.T, s=size, c=colours.retain, alpha=0.5, linewidths=0, label="retain")
    look = {"marker": "X", "edgecolors": "black", "linewidths": 0.4, "label": "forget"}
    axis.scatter(*sets.forget.T, s=2 * size, c=colours.forget, alpha=0.9, **look)
    axis.set(title=title, xticks=(), yticks=())
  roles = [
    Line2D([], [], color=drawing.GREY, marker=marker, linestyle="none", markersize=8, label=role)
    for role, marker in (("retain", "o"), ("forget", "X"))
  ]
  named = classes if len(classes) <= _NAMED_CLASSES else ()
  roles += [
    Line2D([], [], color=colour[label], marker="s", linestyle="none", label=f"class {label}")
    for label in named
  ]
  figure.legend(handles=roles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
  drawing.save(figure, f"{os.fspath(path)}.png", f"{os.fspath(path)}.pdf")


def _class_colours(classes: Sequence[int]) -> dict[int, str]:
  """A colour for each class. Up to ten classes differ in hue; more than twenty share colours."""
  import matplotlib
  from matplotlib.colors import to_hex

  palette = matplotlib.color_sequences["tab10" if len(classes) <= 10 else "tab20"]
  return {label: to_hex(palette[place % len(palette)]) for place, label in enumerate(classes)}


def landscapes(
  coordinates: np.ndarray, grids: Mapping[str, Mapping[str, np.ndarray]], path: os.PathLike | str
) -> None:
  """Draws the loss around several models as surfaces and as contours.

  There is a row for each set, with a surface and contours for each model. All models of a row share one
  scale, which is logarithmic if losses differ much. Losses that are not finite are left blank.

  Args:
    coordinates: [P] coordinates along both directions.
    grids: {title of the model: {set: [P, P] losses in nats}}, with the second direction as the first
      axis; the same sets for all models.
    path: Path of the figures, without .png and .pdf.

  Raises:
    UserError: if `path` cannot be written.
  """
  from matplotlib.figure import Figure

  roles = tuple(next(iter(grids.values())))
  width, height = 9 * len(grids), 4.4 * len(roles)
  figure = Figure(figsize=(width, height), dpi=120)
  figure.suptitle("Loss on a plane through the parameters of each model (cross)", fontsize=13)
  # The axes are placed manually, because automatic layouts ignore the labels of a 3-D axis.
  layout = figure.add_gridspec(
    len(roles),
    2 * len(grids) + 1,
    width_ratios=[1.15, 1] * len(grids) + [0.06],
    left=0.01,
    right=1 - 0.9 / width,
    bottom=0.62 / height,
    top=1 - 0.79 / height,
    wspace=0.3,
    hspace=0.25,
  )
  for row, role in enumerate(roles):
    losses = {f"{role} loss, {title}": np.ma.masked_invalid(sets[role]) for title, sets in grids.items()}
    scale = _Scale.of(losses.values())
    for column, (title, grid) in enumerate(losses.items()):
      surface = figure.add_subplot(layout[row, 2 * column], projection="3d")
      contours = figure.add_subplot(layout[row, 2 * column + 1])
      _surface(surface, coordinates, grid, scale)
      _contours(contours, coordinates, grid, scale)
      for axis, ticks in ((surface, (-1, 0, 1)), (contours, (-1, -0.5, 0, 0.5, 1))):
        axis.set(title=title, xlabel="first direction", xticks=ticks, yticks=ticks)
        axis.set_ylabel("second direction", labelpad=4)
    figure.colorbar(scale.mappable(), cax=figure.add_subplot(layout[row, -1]), label="nats")
  drawing.save(figure, f"{os.fspath(path)}.png", f"{os.fspath(path)}.pdf")


class _Scale(NamedTuple):
  """The range of losses that a row of panels shares."""

  low: float
  high: float
  logarithmic: bool

  @classmethod
  def of(cls, grids: Iterable[np.ma.MaskedArray]) -> "_Scale":
    values = np.concatenate([grid.compressed() for grid in grids])
    low, high = float(values.min()), float(values.max())
    if high > _WIDE * low:
      return cls(max(low, min(_LEAST_LOSS, high / _WIDE)), high, True)
    # A range of zero width has no levels.
    return cls(low, high if high > low else low + 1, False)

  def heights(self, losses: np.ma.MaskedArray) -> np.ma.MaskedArray:
    """The drawn heights: losses, or their decimal logarithms."""
    return np.ma.log10(np.maximum(losses, self.low)) if self.logarithmic else losses

  @property
  def limits(self) -> tuple[float, float]:
    """The limits of the heights."""
    return (np.log10(self.low), np.log10(self.high)) if self.logarithmic else (self.low, self.high)

  def mappable(self):
    """The mappable of the colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    norm = LogNorm if self.logarithmic else Normalize
    return ScalarMappable(norm(self.low, self.high), "viridis")


def _surface(axis, coordinates: np.ndarray, grid: np.ma.MaskedArray, scale: _Scale) -> None:
  from matplotlib.ticker import MaxNLocator

  low, high = scale.limits
  axis.plot_surface(
    *np.meshgrid(coordinates, coordinates),
    scale.heights(grid).filled(np.nan),
    cmap="viridis",
    vmin=low,
    vmax=high,
    rcount=len(grid),
    ccount=len(grid),
    linewidth=0.2,
    edgecolor="black",
  )
  axis.set_zlim(low, high)
  axis.zaxis.set_major_locator(MaxNLocator(5, integer=scale.logarithmic))
  axis.zaxis.set_major_formatter("$10^{{{x:.0f}}}$" if scale.logarithmic else "{x:.3g}")


def _contours(axis, coordinates: np.ndarray, grid: np.ma.MaskedArray, scale: _Scale) -> None:
  heights = scale.heights(grid)
  low, high = scale.limits
  levels = np.linspace(low, high, _LEVELS + 1)
  axis.contourf(coordinates, coordinates, heights, levels=levels, cmap="viridis", vmin=low, vmax=high)
  axis.contour(
    coordinates, coordinates, heights, levels=levels, colors="white", linewidths=0.5, linestyles="solid"
  )
  axis.plot(0, 0, "x", color="white", markersize=9, markeredgewidth=2)
  axis.set_aspect("equal")
