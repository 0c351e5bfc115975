"""Common parts of the figures that compare runs: sheets of panels, and a style for each group."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hamu_jax.report.fields import METHOD, grouped, is_task_field, key_of
from hamu_jax.report.study import Group, Study

# These leave out the orange and the purple of the original and the retrained model.
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
_LEGEND_CHARACTERS = 13.5  # that fit in an inch of a legend


class Style(NamedTuple):
  """Style and label of a group."""

  colour: str
  marker: str
  line: Any
  label: str


class Styles:
  """Styles of groups: the colour depends on the method, marker and line style on its hyperparameters.

  Args:
    study: Study of the groups.
    without: Fields that are shown in another way.
  """

  def __init__(self, study: Study, without: Sequence[str] = ()):
    self._study = study
    self._rest = [
      name for name in study.shown if name not in without and name != METHOD and not is_task_field(name)
    ]
    self._methods = list(dict.fromkeys(group.settings[METHOD] for group in study.groups))
    self._combinations = list(grouped(study.groups, lambda group: key_of(group.settings, self._rest)))

  def colour(self, settings: Mapping[str, Any]) -> str:
    """The colour of the method."""
    return _COLOURS[self._methods.index(settings[METHOD]) % len(_COLOURS)]

  def of(self, settings: Mapping[str, Any]) -> Style:
    """The style of a group with these settings."""
    place = self._combinations.index(key_of(settings, self._rest))
    return Style(
      self.colour(settings),
      _MARKERS[place % len(_MARKERS)],
      _LINES[place % len(_LINES)],
      self.label(settings),
    )

  def label(self, settings: Mapping[str, Any]) -> str:
    """The method, with the fields that distinguish its groups."""
    method = settings[METHOD]
    options = [name for name in self._study.options(method) if name in self._rest]
    return self._study.title(settings, (METHOD, *options))


class Sheet:
  """A figure of equal panels with one legend below.

  Args:
    study: Study to show; its label is below the title.
    title: Title of the figure.
    panels: Number of panels.
    columns: Number of panels in a row.
    size: Width and height of a panel, in inches.
  """

  def __init__(self, study: Study, title: str, panels: int, columns: int, size: tuple[float, float]):
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
    """Adds one legend for all panels and returns the figure."""
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


def task_title(study: Study, groups: Sequence[Group]) -> str:
  """The common values of the groups' task fields, in words."""
  return study.title(groups[0].settings, study.task_fields)


def _wrapped(line: str, inches: float, size: float) -> str:
  """Wraps a line at spaces to a width in inches; a character is about 0.6 of its size wide."""
  return textwrap.fill(line, int(inches * 72 / (0.6 * size)))
