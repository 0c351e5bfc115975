"""Compares runs: tables with means and deviations over seeds, figures, and one page to browse them.

  python -m hamu_jax.report RUNS... --out=DIR

reads every run directory at or below RUNS and writes into DIR

    index.html      everything on one page that needs no other file
    report.md       the tables in Markdown
    NAME.csv, .tex  each table for spreadsheets (full precision) and for papers (LaTeX with booktabs)
    NAME.png, .pdf  each figure

Rows are grouped by all that differs between the configurations, seeds aside. Means over different
datasets would say nothing, so they are refused; --by-dataset reports each by itself, in a folder of DIR.
"""

import argparse
import base64
import csv
import html
import io
import math
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from hamu_jax.errors import UserError
from hamu_jax.report import figures, gather
from hamu_jax.run import command_line
from hamu_jax.run.rundir import write_bytes


class Number(NamedTuple):
  """A cell with a mean over seeds."""

  estimate: gather.Estimate
  digits: int

  def text(self, plus_minus: str = "±") -> str:
    """``mean ± deviation``; the mean alone for one seed."""
    mean = _fixed(self.estimate.mean, self.digits)
    if math.isnan(self.estimate.std) or math.isnan(self.estimate.mean):
      return mean
    return f"{mean} {plus_minus} {_fixed(self.estimate.std, self.digits)}"


class Table(NamedTuple):
  """A table as it is meant, before any format; None is a cell that does not exist."""

  name: str  # of its files
  title: str
  header: tuple[str, ...]
  rows: tuple[tuple[str | Number | None, ...], ...]


class Section(NamedTuple):
  """What is reported of one dataset."""

  title: str
  folder: pathlib.Path
  tables: list[Table]
  pictures: list[figures.Picture]


class _Column(NamedTuple):
  pattern: str  # of names in the results; * stands for a split
  title: str  # {} takes what * stands for
  scale: float = 1
  digits: int = 4


# The tables of results; a column is there if a run has it.
_TABLES = {
  ("results", "Results"): (
    _Column("retain.accuracy", "retain acc %", 100, 2),
    _Column("forget.accuracy", "forget acc %", 100, 2),
    _Column("test.accuracy", "test acc %", 100, 2),
    _Column("test_retain.accuracy", "kept test acc %", 100, 2),
    _Column("test_forget.accuracy", "forgotten test acc %", 100, 2),
    _Column("suite.retain.rouge", "retain ROUGE %", 100, 2),
    _Column("suite.forget.rouge", "forget ROUGE %", 100, 2),
    _Column("suite.model_utility", "model utility"),
    _Column("suite.forget_quality", "forget quality"),
    _Column("suite.watermark.forget_retain_auc", "watermark AUC"),
    _Column("forget_test_auc", "forget/test loss AUC"),
    _Column("membership.confidence", "unseen % MIA", 100, 2),
    _Column("tug_of_war", "tug of war"),
  ),
  ("losses", "Losses and attacks"): (
    _Column("*.loss", "{} loss"),
    _Column("*_auc", "{} AUC"),
    _Column("membership.*", "MIA {} %", 100, 2),
    _Column("tug_of_war_signed", "signed tug of war"),
  ),
  ("language", "Scores of generated and true answers"): (
    _Column("suite.*.rouge", "{} ROUGE %", 100, 2),
    _Column("suite.*.probability", "{} probability"),
    _Column("suite.*.truth_ratio", "{} truth ratio"),
    _Column("suite.truth_ratio_distance", "truth ratio distance"),
    _Column("suite.watermark.*", "watermark {}"),
  ),
}
_TIMING = (
  _Column("seconds.*", "{} s", digits=1),
  _Column("steps", "steps", digits=1),
  _Column("seconds_per_step", "s a step"),
  _Column("tokens_per_second", "tokens a s", digits=1),
)
_SPLITS = ("retain", "forget", "test", "test_retain", "test_forget")
_STAGES = ("memorization", "pretrain", "retrain", "mask", "unlearn")


def tables(study: gather.Study) -> list[Table]:
  """The tables of a study: results, timing, what differs, and all runs.

  Args:
    study: Of `gather.studies`.

  Returns:
    Those that have something to show, in the order in which to show them. The last, ``values``, has every
    number of the results under its name there.
  """
  rows = list(_model_rows(study))
  names = list(dict.fromkeys(name for _, group in rows for name in group.columns))
  header = (*_setting_header(study), "seeds")
  found = []
  for (name, title), columns in _TABLES.items():
    chosen = list(_matching(columns, names))
    if any(column in group.columns for column, *_ in chosen for _, group in rows):
      found.append(
        Table(
          name,
          title,
          (*header, *(title for _, title, _ in chosen)),
          tuple(
            (*settings, str(len(group.runs)), *_numbers(group.columns, chosen))
            for settings, group in rows
            if any(column in group.columns for column, *_ in chosen)
          ),
        )
      )
  found += [*_deviations(study), *_timing(study), *_settings(study), _runs(study)]
  if rows:
    every = [(name, name, _Column(name, name)) for name in sorted(names)]
    found.append(
      Table(
        "values",
        "All numbers of the results",
        (*header, *sorted(names)),
        tuple((*settings, str(len(group.runs)), *_numbers(group.columns, every)) for settings, group in rows),
      )
    )
  return found


def markdown(table: Table) -> str:
  """The table in Markdown; numbers are to the right."""

  def line(cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

  rules = ["---:" if numeric else "---" for numeric in _numeric(table)]
  return "\n".join([line(table.header), line(rules), *(line(map(_text, row)) for row in table.rows)]) + "\n"


def comma_separated(table: Table) -> str:
  """The table as CSV, in full precision: a mean, a deviation and a count for each number."""
  numeric = _numeric(table)
  header = [
    name
    for title, is_number in zip(table.header, numeric)
    for name in ((f"{title} mean", f"{title} std", f"{title} n") if is_number else (title,))
  ]
  stream = io.StringIO()
  writer = csv.writer(stream, lineterminator="\n")
  writer.writerow(header)
  for row in table.rows:
    cells = []
    for cell, is_number in zip(row, numeric):
      if isinstance(cell, Number):
        mean, std, count = cell.estimate
        cells += [mean, "" if math.isnan(std) and count == 1 else std, count]
      else:
        cells += ["", "", ""] if is_number else [_text(cell)]
    writer.writerow(cells)
  return stream.getvalue()


def latex(table: Table) -> str:
  """The table as a LaTeX tabular, for the package booktabs."""

  def cell(value):
    if isinstance(value, Number):
      # Words such as nan are no mathematics.
      text = value.text(r"\pm").replace("e-", r"\mathrm{e}{-}")
      return text if math.isnan(value.estimate.mean) else f"${text}$"
    return _latex_text(_text(value))

  def line(cells):
    return "  " + " & ".join(cells) + r" \\"

  columns = "".join("r" if numeric else "l" for numeric in _numeric(table))
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


def page(sections: Sequence[Section], notes: Sequence[str]) -> str:
  """The whole report as one HTML page, its images inside.

  Args:
    sections: With their figures written.
    notes: What is to be said about runs that are not whole.
  """
  parts = []
  for number, section in enumerate(sections):
    shown = [table for table in section.tables if table.name != "values"]
    anchors = [(f"{number}-{one.name}", one.title) for one in (*shown, *section.pictures)]
    links = " ".join(f'<a href="#{anchor}">{html.escape(title)}</a>' for anchor, title in anchors)
    parts.append(f"<section><h2>{html.escape(section.title)}</h2><nav>{links}</nav>")
    for (anchor, title), item in zip(anchors, (*shown, *section.pictures)):
      body = _html_table(item) if isinstance(item, Table) else _image(section.folder, item)
      parts.append(f'<h3 id="{anchor}">{html.escape(title)}</h3>{body}')
    parts.append("</section>")
  said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
  return _PAGE.format(notes=f"<ul>{said}</ul>" if said else "", sections="\n".join(parts), legend=_LEGEND)


_LEGEND = (
  "Means ± sample standard deviations over seeds; a mean alone is a single seed. Rows differ in what "
  "their first columns say; what else differs between the configurations is under Settings."
)
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Unlearning runs</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1.5em; }}
nav {{ position: sticky; top: 0; z-index: 2; background: white; padding: .5em 0; }}
nav a {{ margin-right: 1.2em; }}
h3 {{ scroll-margin-top: 5em; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; }}
th, td {{ padding: .25em .8em; text-align: left; white-space: nowrap; }}
th {{ border-bottom: 2px solid black; vertical-align: bottom; }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
tbody tr:nth-child(even) {{ background: #f4f4f4; }}
tr.reference {{ font-style: italic; }}
img {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>Unlearning runs</h1>
<p>{legend}</p>
{notes}
{sections}
</body>
</html>
"""


def write(
  sections: Iterable[tuple[gather.Study, pathlib.Path]], out: pathlib.Path, notes: Sequence[str]
) -> None:
  """Writes a report.

  Args:
    sections: Studies, each with the folder for its tables and figures.
    out: Folder of the page; both folders exist.
    notes: What is to be said about runs that are not whole.

  Raises:
    UserError: something cannot be written.
  """
  written, lines = [], ["# Unlearning runs", "", _LEGEND, "", *(f"- {note}" for note in notes)]
  for study, folder in sections:
    section = Section(study.label, folder, tables(study), figures.draw(study, folder))
    lines += ["", f"## {section.title}"]
    for table in section.tables:
      write_bytes(folder / f"{table.name}.csv", comma_separated(table).encode())
      if table.name != "values":
        write_bytes(folder / f"{table.name}.tex", latex(table).encode())
        lines += ["", f"### {table.title}", "", markdown(table).rstrip("\n")]
    for picture in section.pictures:
      path = (folder / picture.name).relative_to(out).as_posix()
      lines += ["", f"### {picture.title}", "", picture.caption, "", f"![{picture.title}]({path}.png)"]
    written.append(section)
  write_bytes(out / "report.md", ("\n".join(lines) + "\n").encode())
  write_bytes(out / "index.html", page(written, notes).encode())


# Tables


def _model_rows(study: gather.Study) -> Iterator[tuple[tuple[str | None, ...], gather.Group]]:
  """Settings as cells and group, problem by problem, each with its original and retrained model first."""
  fields = study.problem_fields
  for problem, groups in study.problems().items():
    references = [one for one in study.references if gather.key_of(one.settings, fields) == problem]
    for group in (*references, *groups):
      settings = [group.settings[name] if name in group.settings else None for name in study.shown]
      name = group.settings[gather.METHOD] if group.model == "unlearned" else group.model
      yield (
        (
          name,
          *(
            gather.text(value) if field in group.settings else None
            for field, value in zip(study.shown[1:], settings[1:])
          ),
        ),
        group,
      )


def _setting_header(study: gather.Study) -> tuple[str, ...]:
  return ("method", *(study.short(name) for name in study.shown[1:]))


def _matching(columns: Iterable[_Column], names: Sequence[str]) -> Iterator[tuple[str, str, _Column]]:
  """Name, title and column of what there is, splits and stages in their order."""
  for column in columns:
    pattern = re.compile(re.escape(column.pattern).replace(r"\*", "([^.]*)"))
    found = {name: match for name in names if (match := pattern.fullmatch(name))}
    for name in sorted(found, key=lambda name: _place(found[name].groups())):
      yield name, column.title.format(*(group.replace("_", " ") for group in found[name].groups())), column


def _place(parts: tuple[str, ...]) -> tuple[int, str]:
  """Where a split or stage comes in order; others follow by name."""
  order = (*_SPLITS, *_STAGES)
  word = parts[0] if parts else ""
  return (order.index(word) if word in order else len(order), word)


def _numbers(values: Mapping[str, gather.Estimate], chosen) -> Iterator[Number | None]:
  for name, _, column in chosen:
    estimate = values.get(name)
    yield (
      None
      if estimate is None
      else Number(
        gather.Estimate(column.scale * estimate.mean, column.scale * estimate.std, estimate.count),
        column.digits,
      )
    )


def _deviations(study: gather.Study) -> Iterator[Table]:
  """How much each seed alone spreads the results, where runs differ in several."""
  by_group = [(group, gather.deviations(group)) for group in study.groups]
  fields = dict.fromkeys(field for _, found in by_group for field in found)
  if len(fields) < 2:
    return
  names = list(dict.fromkeys(name for _, found in by_group for one in found.values() for name in one))
  chosen = list(_matching(_TABLES["results", "Results"], names))
  yield Table(
    "deviations",
    "Standard deviations by the seed that changes",
    (*_setting_header(study), "seed", *(title for _, title, _ in chosen)),
    tuple(
      (*(gather.text(group.settings[name]) for name in study.shown), field, *_numbers(values, chosen))
      for group, found in by_group
      for field, values in found.items()
    ),
  )


def _timing(study: gather.Study) -> Iterator[Table]:
  """Seconds by method; runs on other devices are rows of their own."""
  rows = []
  for group in study.groups:
    for device, runs in gather.grouped(group.runs, lambda run: run.device).items():
      rows.append((group, device, len(runs), gather.estimates(run.timing for run in runs)))
  chosen = list(_matching(_TIMING, list(dict.fromkeys(name for *_, values in rows for name in values))))
  if chosen:
    yield Table(
      "timing",
      "Timing, compiling included",
      (*_setting_header(study), "device", "seeds", *(title for _, title, _ in chosen)),
      tuple(
        (
          *(gather.text(group.settings[name]) for name in study.shown),
          device,
          str(count),
          *_numbers(values, chosen),
        )
        for group, device, count, values in rows
      ),
    )


def _settings(study: gather.Study) -> Iterator[Table]:
  """All that differs, where the other tables do not show it."""
  if len(study.fields) > len(study.shown) and study.groups:
    yield Table(
      "settings",
      "Settings",
      ("method", *(study.short(name) for name in study.fields[1:])),
      tuple(tuple(gather.text(value) for value in group.settings.values()) for group in study.groups),
    )


def _runs(study: gather.Study) -> Table:
  """Every run, finished or not."""
  seeds = list(
    dict.fromkeys(name for run in study.runs for name, seed in run.seeds.items() if seed is not None)
  )
  rows = [
    (
      str(run.path),
      *(gather.text(run.config[name]) for name in study.shown),
      *(gather.text(run.config[name]) for name in seeds),
      run.status,
      run.summary.get("stop_reason", "") if run.summary else "",
      run.device,
    )
    for run in study.runs
  ]
  header = ("run", *_setting_header(study), *seeds, "status", "why it ended", "device")
  return Table("runs", "Runs", header, tuple(rows))


def _numeric(table: Table) -> list[bool]:
  return [any(isinstance(row[place], Number) for row in table.rows) for place in range(len(table.header))]


def _text(cell: str | Number | None) -> str:
  return "" if cell is None else cell.text() if isinstance(cell, Number) else cell


def _fixed(value: float, digits: int) -> str:
  """Fixed digits, or three significant ones where those would show nothing of a small number."""
  return f"{value:.2e}" if 0 < abs(value) < 0.5 * 10**-digits else f"{value:.{digits}f}"


_LATEX = {
  "\\": r"\textbackslash{}",
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  "±": r"$\pm$",
  **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _latex_text(text: str) -> str:
  return "".join(_LATEX.get(character, character) for character in text)


def _html_table(table: Table) -> str:
  numeric = _numeric(table)

  def row(tag, cells, style=""):
    return (
      f"<tr{style}>"
      + "".join(
        f"<{tag}{' class=number' if is_number else ''}>{html.escape(_text(cell))}</{tag}>"
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


def _image(folder: pathlib.Path, picture: figures.Picture) -> str:
  data = base64.b64encode((folder / f"{picture.name}.png").read_bytes()).decode()
  title, caption = html.escape(picture.title), html.escape(picture.caption)
  return f'<p>{caption}</p><img alt="{title}" src="data:image/png;base64,{data}">'


# Command line


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  parser = command_line.Parser(prog="python -m hamu_jax.report", description=__doc__)
  parser.add_argument("runs", nargs="+", type=pathlib.Path, help="run directories, or folders of them")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
  parser.add_argument("--by-dataset", action="store_true", help="report several datasets, each by itself")
  return parser.parse_intermixed_args(arguments)


def _folder(path: pathlib.Path) -> pathlib.Path:
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--out={path}: {error.strerror or error}; choose another folder") from error
  return path


def _slug(label: str) -> str:
  """A folder name for a dataset."""
  return re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.") or "data"


def _report(options: argparse.Namespace) -> None:
  gathered = gather.gather(options.runs)
  studies = gather.studies(gathered.runs, by_dataset=options.by_dataset)
  out = _folder(options.out)
  slugs = [_slug(study.label) for study in studies]
  folders = [
    out if not options.by_dataset else _folder(out / (slug if slugs.count(slug) == 1 else f"{slug}-{place}"))
    for place, slug in enumerate(slugs)
  ]
  write(zip(studies, folders), out, gathered.notes)
  for note in gathered.notes:
    print(f"note: {note}", file=sys.stderr)
  unfinished = sum(run.summary is None for run in gathered.runs)
  print(f"{len(gathered.runs)} runs, {unfinished} of them unfinished; everything is in {out} (index.html)")


def run(arguments: Sequence[str]) -> int:
  """Parses a command line and writes the report.

  Args:
    arguments: As `sys.argv`, the program's name first.

  Returns:
    The exit status: 0, or 2 for bad input.
  """
  return command_line.run(lambda: _report(_parse(arguments[1:])))
