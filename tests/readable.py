"""The texts of a figure, and a check that all of them can be read."""

import itertools

from matplotlib.backends.backend_agg import FigureCanvasAgg


def texts(figure):
  """Every visible piece of text with its extent in pixels; of axes in space, without the tick labels."""
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  renderer = canvas.get_renderer()
  found = [figure._suptitle] if figure._suptitle else []
  legends = list(figure.legends)
  for axis in figure.axes:
    found += [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
    legends += [axis.get_legend()] if axis.get_legend() else []
    if hasattr(axis, "zaxis"):
      continue
    for side, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
      found += [
        label
        for label, tick in zip(side.get_ticklabels(), side.get_ticklocs())
        if min(limits) <= tick <= max(limits)
      ]
  found += [text for legend in legends for text in legend.get_texts()]
  return [
    (text.get_text(), text.get_window_extent(renderer))
    for text in found
    if text.get_visible() and text.get_text()
  ]


def assert_readable(figure):
  """No visible text leaves the figure or runs into another."""
  boxes = texts(figure)
  width, height = figure.get_size_inches() * figure.dpi
  for text, box in boxes:
    assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text
  for (first, a), (second, b) in itertools.combinations(boxes, 2):
    overlap_x = min(a.x1, b.x1) - max(a.x0, b.x0)
    overlap_y = min(a.y1, b.y1) - max(a.y0, b.y0)
    assert overlap_x <= 1 or overlap_y <= 1, f"{first!r} runs into {second!r}"
