"""The text of `--help`: each field by section, with its default, meaning, values and readers."""

import textwrap

from hamu_jax.config.fields import SECTIONS, Field
from hamu_jax.config.readers import ALWAYS

_COLUMNS = 100
_INDENT = " " * 6


def help_text() -> str:
  """Describes all fields of a configuration."""
  parts = []
  for section in SECTIONS:
    title = f"config.{section.name}" if section.name else "config"
    parts.append(textwrap.fill(f"{title}: {section.about}", _COLUMNS))
    parts += [_entry(field) for field in section.fields]
    parts.append("")
  return "\n".join(parts).rstrip()


def _entry(field: Field) -> str:
  default = "(not set)" if field.default is None else f"{field.default!r}"
  about = f"{field.about} Values: {field.kind.words}."
  if field.reader is not ALWAYS:
    about += f" Read {field.reader.says()}."
  text = textwrap.fill(about, _COLUMNS, initial_indent=_INDENT, subsequent_indent=_INDENT)
  return f"  --config.{field.name}={default}\n{text}"
