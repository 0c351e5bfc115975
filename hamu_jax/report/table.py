"""A table, and its forms in Markdown, CSV, LaTeX and HTML."""

import csv
import html
import io
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hamu_jax.report.study import Estimate

_LATEX = {
  "\\": r"\textbackslash{}",
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  "±": r"$\pm$",
  # After the end of a row, a bracket would begin an argument.
  "[": "{[}",
  **{character: f"\\{character}" for character in "&%$#_{}"},
}


class Number(NamedTuple):
  """A cell with a mean over seeds."""

  estimate: Estimate
  digits: int
  scientific: bool = False  # whether it is written as 1.00e-09; all numbers of a column or none

  def text(self, plus_minus: str = "±") -> str:
    """``mean ± standard deviation``, or only the mean for one seed."""
    style = ".2e" if self.scientific else f".{self.digits}f"
    mean = f"{self.estimate.mean:{style}}"
    if math.isnan(self.estimate.std) or math.isnan(self.estimate.mean):
      return mean
    return f"{mean} {plus_minus} {self.estimate.std:{style}}"

  @property
  def vanishes(self) -> bool:
    """Whether a mean that is not 0 would be rounded to 0."""
    return 0 < abs(self.estimate.mean) < 0.5 * 10**-self.digits


Cell = str | Number | None


class Table(NamedTuple):
  """A table independent of its format; None is an empty cell."""

  name: str  # name of its files
  title: str
  header: tuple[str, ...]
  rows: tuple[tuple[Cell, ...], ...]

  @property
  def numeric(self) -> list[bool]:
    """Whether each column has numbers."""
    return [any(isinstance(row[place], Number) for row in self.rows) for place in range(len(self.header))]


def with_one_format(rows: Iterable[Sequence[Cell]]) -> tuple[tuple[Cell, ...], ...]:
  """The rows of a table, with scientific numbers in each column where a mean would be rounded to 0."""
  rows = [tuple(row) for row in rows]
  tiny = {
    place for row in rows for place, cell in enumerate(row) if isinstance(cell, Number) and cell.vanishes
  }
  return tuple(
    tuple(
      cell._replace(scientific=True) if isinstance(cell, Number) and place in tiny else cell
      for place, cell in enumerate(row)
    )
    for row in rows
  )


def markdown(table: Table) -> str:
  """The table in Markdown, with numbers aligned to the right."""

  def line(cells):
    return "| " + " | ".join(map(markdown_text, cells)) + " |"

  rules = ["---:" if numeric else "---" for numeric in table.numeric]
  return (
    "\n".join([line(table.header), line(rules), *(line(map(cell_text, row)) for row in table.rows)]) + "\n"
  )


def comma_separated(table: Table) -> str:
  """The table as CSV, in full precision: mean, standard deviation and count of each number."""
  numeric = table.numeric
  header = [
    name
    for title, is_number in zip(table.header, numeric)
    for name in ((f"{title} mean", f"{title} std", f"{title} n") if is_number else (title,))
  ]
  stream = io.StringIO()
  writer = csv.writer(stream, lineterminator="\n")
  writer.writerow(map(_csv_text, header))
  for row in table.rows:
    cells = []
    for cell, is_number in zip(row, numeric):
      if isinstance(cell, Number):
        mean, std, count = cell.estimate
        cells += [mean, "" if math.isnan(std) and count == 1 else std, count]
      else:
        cells += ["", "", ""] if is_number else [_csv_text(cell_text(cell))]
    writer.writerow(cells)
  return stream.getvalue()


def latex(table: Table) -> str:
  """The table as a LaTeX tabular, for the package booktabs."""

  def cell(value):
    if isinstance(value, Number):
      # Words such as nan are not set in mathematics.
      text = value.text(r"\pm").replace("e-", r"\mathrm{e}{-}")
      return text if math.isnan(value.estimate.mean) else f"${text}$"
    return _latex_text(cell_text(value))

  def line(cells):
    return "  " + " & ".join(cells) + r" \\"

  columns = "".join("r" if numeric else "l" for numeric in table.numeric)
  return "\n".join(
    [
      f"% {table.title}; needs \\usepackage{{booktabs}}",
      f"\\begin{{tabular}}{{{columns}}}",
      r"  \toprule",
      line(map(_latex_text, table.header)),
      r"  \midrule",
      *(line(map(cell, row)) for row in table.rows),
      r"  \bottomrule",
      r"\end{tabular}",
      "",
    ]
  )


def html_table(table: Table) -> str:
  """The table as an HTML element; markup in cells is escaped."""
  numeric = table.numeric

  def row(tag, cells, style=""):
    return (
      f"<tr{style}>"
      + "".join(
        f"<{tag}{' class=number' if is_number else ''}>{html.escape(cell_text(cell))}</{tag}>"
        for cell, is_number in zip(cells, numeric)
      )
      + "</tr>"
    )

  body = "\n".join(
    row("td", cells, ' class="reference"' if cells[0] in ("original", "retrained") else "")
    for cells in table.rows
  )
  head = row("th", table.header)
  return f'<div class="wide"><table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>'


def cell_text(cell: str | Number | None) -> str:
  """The text of a cell; empty for None."""
  return "" if cell is None else cell.text() if isinstance(cell, Number) else _one_line(cell)


def markdown_text(text: str) -> str:
  """Text in which Markdown finds neither markup nor HTML, nor the end of a cell or line."""
  return re.sub(r"([\\|\[\]`])", r"\\\1", html.escape(_one_line(text), quote=False))


def _csv_text(text: str) -> str:
  """Text that a spreadsheet does not take for a formula."""
  text = _one_line(text)
  return f"'{text}" if text[:1] in ("=", "+", "-", "@") and not _is_decimal(text) else text


def _is_decimal(text: str) -> bool:
  return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.ASCII | re.IGNORECASE) is not None


def _one_line(text: str) -> str:
  """Text without line ends and other control characters."""
  return "".join(" " if unicodedata.category(each) in ("Cc", "Zl", "Zp") else each for each in text).strip()


def _latex_text(text: str) -> str:
  return "".join(_LATEX.get(character, character) for character in _one_line(text))
