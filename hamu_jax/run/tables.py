"""Aligned text tables, and the table of a run's results."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_STAGES = {"original": "pretrain", "retrained": "retrain", "unlearned": "unlearn"}


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Aligns columns: the first to the left and, if there is a header, the others to the right."""
  cells = [[str(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return "\n".join(
    "  ".join(
      cell.rjust(width) if column and header else cell.ljust(width)
      for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in cells
  )


def results_table(summary: Mapping[str, Any], width: int = 100) -> str:
  """The results of a run as aligned text. Columns that do not fit beside the others come below them.

  There is one row for each model that the run has. Accuracies are in percent. A value that a row does not
  have is "-"; a value that is not finite is "nan".

  Args:
    summary: The content of summary.json: ``results`` by model, ``seconds`` by stage.
    width: Number of characters of a line.

  Returns:
    One or several blocks of lines of equal length in one string, without a trailing newline.
  """
  rows = [name for name in _STAGES if name in summary["results"]]
  rows = [*(name for name in summary["results"] if name not in _STAGES), *rows]
  first = max(map(len, rows), default=0)
  blocks: list[list[list[str]]] = [[]]
  left = width - first
  for group in (_splits, _suites, _comparisons):
    columns = list(group(summary, rows))
    widths = [2 + max(map(len, column)) for column in columns]
    # A group goes below as a whole, unless it is wider than a line.
    for number, (column, taken) in enumerate(zip(columns, widths, strict=True)):
      if blocks[-1] and (taken if number else sum(widths)) > left:
        blocks.append([])
        left = width - first
      blocks[-1].append(column)
      left -= taken
  return "\n\n".join(_block(rows, first, columns) for columns in blocks)


def print_results(summary: Mapping[str, Any]) -> None:
  """Prints `results_table` as wide as the terminal; a file or a pipe, which has no width, gets 100."""
  print(results_table(summary, shutil.get_terminal_size((100, 24)).columns))


def _block(rows: Sequence[str], first: int, columns: Sequence[Sequence[str]]) -> str:
  """Columns with two header lines beside the names of the rows, which take `first` characters."""
  widths = [max(map(len, column)) for column in columns]
  lines = [
    "  ".join([name.ljust(first), *(text.rjust(width) for text, width in zip(cells, widths))])
    for name, *cells in zip(["", "", *rows], *columns)
  ]
  return "\n".join([*lines[:2], "-" * len(lines[0]), *lines[2:]])


def _splits(summary: Mapping[str, Any], rows: list[str]) -> Iterator[list[str]]:
  """Yields the columns of accuracies and losses as texts, each with two header lines."""
  results = summary["results"]
  for split in ("retain", "forget", "test"):
    cells = [results[row].get(split, {}) for row in rows]
    yield [split, "acc %", *(_percent(cell, "accuracy") for cell in cells)]
    yield [split, "loss", *(_cell(cell, "loss", 4) for cell in cells)]
  # If whole classes are forgotten: test accuracy on the retained classes, and on the forgotten ones.
  for split, name in (("test_retain", "kept"), ("test_forget", "forgotten")):
    cells = [results[row].get(split, {}) for row in rows]
    if any(cells):
      yield ["test acc %", name, *(_percent(cell, "accuracy") for cell in cells)]


def _suites(summary: Mapping[str, Any], rows: list[str]) -> Iterator[list[str]]:
  """Yields the columns of language models: recall of the true answers in generated ones, TOFU's scores."""
  results = summary["results"]
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


def _comparisons(summary: Mapping[str, Any], rows: list[str]) -> Iterator[list[str]]:
  """Yields the columns that compare splits or models, and the seconds."""
  results = summary["results"]
  yield ["forget/test", "loss AUC", *(_cell(results[row], "forget_test_auc", 4) for row in rows)]
  # The share of the forget set that an attack by confidence classifies as non-members.
  cells = [results[row].get("membership", {}) for row in rows]
  if any(cells):
    yield ["unseen", "% MIA", *(_percent(cell, "confidence") for cell in cells)]
  yield ["tug of", "war", *(_cell(results[row], "tug_of_war", 4) for row in rows)]
  seconds = summary.get("seconds", {})
  yield ["", "seconds", *(_cell(seconds, _STAGES.get(row, row), 1) for row in rows)]


def _percent(values: Mapping[str, Any], name: str) -> str:
  value = values.get(name)
  return _cell(values if value is None else {name: 100 * value}, name, 2)


def _cell(values: Mapping[str, Any], name: str, digits: int) -> str:
  return format_number(values[name], digits) if name in values else "-"


def format_number(value: float | None, digits: int) -> str:
  """Formats a number with fixed digits, or with four significant ones if it would exceed ten characters."""
  if value is None:
    return "nan"
  text = f"{float(value):.{digits}f}"
  return text if len(text) <= 10 else f"{float(value):.4g}"
