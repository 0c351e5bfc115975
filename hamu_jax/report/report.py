"""Compares runs: tables with means and standard deviations over seeds, figures, and a page with both.

  python -m hamu_jax.report RUNS... --out=DIR

reads every run directory at or below RUNS and writes into DIR

    index.html      all tables and figures on one page that needs no other file
    report.md       the tables in Markdown
    NAME.csv, .tex  each table for spreadsheets (full precision) and for papers (LaTeX with booktabs)
    NAME.png, .pdf  each figure

Runs are grouped by all fields that differ between the configurations, except seeds. Means over different
datasets would be meaningless, so each dataset has a section of the page and, if there are several, a folder
of DIR.
"""

import argparse
import base64
import html
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hamu_jax.errors import UserError
from hamu_jax.report import figures, gather
from hamu_jax.report.study import Study
from hamu_jax.report.study_tables import tables
from hamu_jax.report.table import Table, comma_separated, html_table, latex, markdown, markdown_text
from hamu_jax.run import command_line
from hamu_jax.run.rundir import write_bytes

_LEGEND = (
  "Means ± sample standard deviations over seeds; a mean alone is a single seed. The first columns are the "
  "fields that tell the rows apart; all other differences between the configurations are under Settings."
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


class Section(NamedTuple):
  """The report on one dataset."""

  title: str
  folder: pathlib.Path
  tables: list[Table]
  pictures: list[figures.Picture]


def write(sections: Iterable[tuple[Study, pathlib.Path]], out: pathlib.Path, notes: Sequence[str]) -> None:
  """Writes a report.

  Args:
    sections: Studies, each with the folder for its tables and figures.
    out: Folder of the page; all folders must exist.
    notes: Notes about runs that are incomplete or damaged.

  Raises:
    UserError: if a file cannot be written.
  """
  written, lines = [], ["# Unlearning runs", "", _LEGEND, "", *(f"- {markdown_text(note)}" for note in notes)]
  for study, folder in sections:
    section = Section(study.label, folder, tables(study), figures.draw(study, folder))
    lines += ["", f"## {markdown_text(section.title)}"]
    for table in section.tables:
      write_bytes(folder / f"{table.name}.csv", comma_separated(table).encode())
      if table.name != "values":
        write_bytes(folder / f"{table.name}.tex", latex(table).encode())
        lines += ["", f"### {markdown_text(table.title)}", "", markdown(table).rstrip("\n")]
    for picture in section.pictures:
      path = (folder / picture.name).relative_to(out).as_posix()
      title = markdown_text(picture.title)
      lines += ["", f"### {title}", "", picture.caption, "", f"![{title}]({path}.png)"]
    written.append(section)
  write_bytes(out / "report.md", ("\n".join(lines) + "\n").encode())
  write_bytes(out / "index.html", page(written, notes).encode())


def page(sections: Sequence[Section], notes: Sequence[str]) -> str:
  """Builds the whole report as one HTML page with embedded images.

  Args:
    sections: Sections whose figures are written.
    notes: Notes about runs that are incomplete or damaged.
  """
  parts = []
  for number, section in enumerate(sections):
    shown = [table for table in section.tables if table.name != "values"]
    items: list[Table | figures.Picture] = [*shown, *section.pictures]
    anchors = [(f"{number}-{one.name}", one.title) for one in items]
    links = " ".join(f'<a href="#{anchor}">{html.escape(title)}</a>' for anchor, title in anchors)
    parts.append(f"<section><h2>{html.escape(section.title)}</h2><nav>{links}</nav>")
    for (anchor, title), item in zip(anchors, items):
      body = html_table(item) if isinstance(item, Table) else _image(section.folder, item)
      parts.append(f'<h3 id="{anchor}">{html.escape(title)}</h3>{body}')
    parts.append("</section>")
  said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
  return _PAGE.format(notes=f"<ul>{said}</ul>" if said else "", sections="\n".join(parts), legend=_LEGEND)


def _image(folder: pathlib.Path, picture: figures.Picture) -> str:
  data = base64.b64encode((folder / f"{picture.name}.png").read_bytes()).decode()
  title, caption = html.escape(picture.title), html.escape(picture.caption)
  return f'<p>{caption}</p><img alt="{title}" src="data:image/png;base64,{data}">'


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  parser = command_line.Parser(prog="python -m hamu_jax.report", description=__doc__)
  parser.add_argument("runs", nargs="+", type=pathlib.Path, help="run directories, or folders of them")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
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
  studies = gather.studies(gathered.runs)
  out = _folder(options.out)
  slugs = [_slug(study.label) for study in studies]
  folders = [
    out if len(studies) == 1 else _folder(out / (slug if slugs.count(slug) == 1 else f"{slug}-{place}"))
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
    arguments: Command line in the form of `sys.argv`, the program's name first.

  Returns:
    The exit status: 0, or 2 for bad input.
  """
  return command_line.run(lambda: _report(_parse(arguments[1:])))
