"""A hook of MkDocs: tables of all fields of a configuration, from the table that declares them.

The page gets them in place of `<!-- fields -->`.
"""

import re

from hamu_jax.config.fields import SECTIONS, Field, Section

_MARK = "<!-- fields -->"


def on_page_markdown(markdown: str, **unused) -> str:
  """Puts the tables into the page that asks for them."""
  del unused
  return markdown.replace(_MARK, tables()) if _MARK in markdown else markdown


def tables() -> str:
  """A heading and a table for each section."""
  return "\n\n".join(part for section in SECTIONS for part in _section(section))


def _section(section: Section) -> list[str]:
  title = f"`config.{section.name}`" if section.name else "Fields of the experiment"
  lines = ["| field | default | | values | read |", "| --- | --- | --- | --- | --- |"]
  lines += [_row(field) for field in section.fields]
  return [f"## {title}", _code(section.about), "\n".join(lines)]


def _row(field: Field) -> str:
  cells = [
    f"`config.{field.name}`",
    f"`{field.default!r}`",
    _code(field.about),
    field.kind.words,
    _code(field.reader.says()),
  ]
  return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _code(text: str) -> str:
  """Names are code: a word with an underscore or a dot in it."""
  return re.sub(r"(?<![`\w.*/-])([a-zA-Z]\w*(?:[._]\w+)+)(?![`\w*/])", r"`\1`", text)
