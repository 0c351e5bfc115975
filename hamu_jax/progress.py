"""What a run shows while it works and when it is done: a progress bar and the table of results."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from tqdm import tqdm

_LINE = "{desc}: {n_fmt}/{total_fmt} steps, {rate_fmt}, ETA {remaining}{postfix}"
_STAGES = {"original": "pretrain", "retrained": "retrain", "unlearned": "unlearn"}


class Progress:
  """The progress of one stage, with rate and time to go; a context manager.

  On a terminal a bar that redraws itself; anywhere else a plain line every few seconds, one at the
  start and one at the end.
  """

  def __init__(
    self,
    stage: str,
    total: int,
    *,
    initial: int = 0,
    shown: tuple[str, ...] = ("retain_loss", "forget_loss"),
    seconds_between_lines: float = 5.0,
    stream: TextIO | None = None,
    enabled: bool = True,
  ):
    """Shows the stage at its first step.

    Args:
      stage: Its name.
      total: Its steps.
      initial: Steps done by an earlier process, which count for the position but not for the rate.
      shown: Names of the metrics to show, where an update has them.
      seconds_between_lines: Off a terminal, the least time between two lines.
      stream: Where to write; None is stderr.
      enabled: False shows nothing, for all but one process of a multi-host run.
    """
    stream = sys.stderr if stream is None else stream
    style = {"dynamic_ncols": True}
    if not stream.isatty():
      stream = _Lines(stream)
      style = {"bar_format": _LINE, "mininterval": seconds_between_lines}
    self._shown = shown
    self._bar = _Bar(
      desc=stage,
      total=total,
      initial=initial,
      unit=" step",
      miniters=1,
      file=stream,
      disable=not enabled,
      **style,
    )

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.close()

  def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
    """Moves to `step`, an absolute position, with the metrics of its last step."""
    texts = [f"{name} {_number(values[name], 4)}" for name in self._shown if name in (values or {})]
    self._bar.set_postfix_str(", ".join(texts), refresh=False)
    self._bar.update(step - self._bar.n)


class _Bar(tqdm):
  monitor_interval = 0  # no watcher thread: updates come regularly


class _Lines:
  """Turns the carriage returns of a bar into lines."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> None:
    if text := text.strip():
      self._stream.write(text + "\n")

  def flush(self) -> None:
    self._stream.flush()


def results_table(summary: Mapping[str, Any]) -> str:
  """The results of a run as aligned text, at most 120 columns wide for ordinary numbers.

  One row for each of the original, retrained and unlearned model that the run has. Accuracies are
  in percent; a value that does not exist for a row is "-", one that is not a number "nan".

  Args:
    summary: The content of summary.json: ``results`` by model, ``seconds`` by stage.

  Returns:
    Lines of equal length, joined; no trailing newline.
  """
  rows = [name for name in _STAGES if name in summary["results"]]
  columns = list(_columns(summary, rows))
  widths = [max(map(len, column)) for column in columns]
  first = max(map(len, rows), default=0)
  lines = [
    "  ".join([name.ljust(first), *(text.rjust(width) for text, width in zip(cells, widths))])
    for name, *cells in zip(["", "", *rows], *columns)
  ]
  return "\n".join([*lines[:2], "-" * len(lines[0]), *lines[2:]])


def _columns(summary: Mapping[str, Any], rows: list[str]) -> Iterator[list[str]]:
  """The columns as texts, two header lines first."""
  results = summary["results"]
  for split in ("retain", "forget", "test"):
    cells = [results[row].get(split, {}) for row in rows]
    yield [split, "acc %", *(_percent(cell, "accuracy") for cell in cells)]
    yield [split, "loss", *(_cell(cell, "loss", 4) for cell in cells)]
  # Whole forgotten classes: the test accuracy on the classes that stay, and on those that go.
  for split, name in (("test_retain", "kept"), ("test_forget", "forgotten")):
    cells = [results[row].get(split, {}) for row in rows]
    if any(cells):
      yield ["test acc %", name, *(_percent(cell, "accuracy") for cell in cells)]
  # Language models: how much of the true answers the generated ones have, and TOFU's two scores.
  suites = [results[row].get("suite", {}) for row in rows]
  if any(suites):
    for split in ("retain", "forget"):
      yield [split, "ROUGE %", *(_percent(suite.get(split, {}), "rouge") for suite in suites)]
    for title, name in (("model", "utility"), ("forget", "quality")):
      key = f"{title}_{name}"
      if any(key in suite for suite in suites):
        yield [title, name, *(_cell(suite, key, 4) for suite in suites)]
    marks = [suite.get("watermark", {}) for suite in suites]
    if any(marks):
      yield ["watermark", "AUC", *(_cell(mark, "forget_retain_auc", 4) for mark in marks)]
  yield ["forget/test", "loss AUC", *(_cell(results[row], "forget_test_auc", 4) for row in rows)]
  # The share of the forget set that an attack by confidence takes for rows the model never saw.
  cells = [results[row].get("membership", {}) for row in rows]
  if any(cells):
    yield ["unseen", "% MIA", *(_percent(cell, "confidence") for cell in cells)]
  yield ["tug of", "war", *(_cell(results[row], "tug_of_war", 4) for row in rows)]
  seconds = summary.get("seconds", {})
  yield ["", "seconds", *(_cell(seconds, _STAGES[row], 1) for row in rows)]


def _percent(values: Mapping[str, Any], name: str) -> str:
  value = values.get(name)
  return _cell(values if value is None else {name: 100 * value}, name, 2)


def _cell(values: Mapping[str, Any], name: str, digits: int) -> str:
  return _number(values[name], digits) if name in values else "-"


def _number(value: float | None, digits: int) -> str:
  """Fixed digits, or four significant ones where those would take more than ten characters."""
  if value is None:
    return "nan"
  text = f"{float(value):.{digits}f}"
  return text if len(text) <= 10 else f"{float(value):.4g}"
