"""Specifications of rows: "forget10", "train[:10%]", "retain[:40]+full[100:]", as `datasets` reads them."""

import re
from typing import NamedTuple

import numpy as np

from hamu_jax.data.text_tables import Table, Tables, length
from hamu_jax.errors import UserError, first_line

# Matches the name of each split.
_NAME = r"(^|\+)\s*(\w+(?:[.-]\w+)*)"


class Part(NamedTuple):
  """Rows of one split of a source."""

  name: str
  table: Table
  rows: np.ndarray  # [n] int64


def of_split(spec: str, name: str) -> str:
  """The specification of the same rows of the split `name`."""
  return re.sub(_NAME, rf"\g<1>{name}", spec)


def read(spec: str, table: Tables, field: str) -> list[Part]:
  """Looks up the splits and rows that a specification names.

  Args:
    spec: the specification.
    table: (name of a split, config field) -> the split.
    field: the config field that holds the specification, for error messages.

  Returns:
    The rows of each split, in the order of the specification.

  Raises:
    UserError: if it is no specification, or names no rows.
  """
  from datasets import ReadInstruction

  # `ReadInstruction` takes no hyphens, which names of files may have.
  names = {f"split_{number}": name for number, (_, name) in enumerate(re.findall(_NAME, spec))}
  aliases = iter(names)
  try:
    instruction = ReadInstruction.from_spec(re.sub(_NAME, lambda found: found[1] + next(aliases), spec))
    tables = {name: table(name, field) for name in names.values()}
    lengths = {name: length(columns) for name, columns in tables.items()}
    slices = instruction.to_absolute({alias: lengths[name] for alias, name in names.items()})
  except UserError:
    raise
  except ValueError as error:
    raise UserError(
      f"{field}={spec!r} names no rows ({first_line(error)}): give a split, such as 'forget10',"
      " or rows of one, such as 'forget10[300:400]' or 'train[:10%]'"
    ) from None
  parts = [
    Part(name, tables[name], np.arange(each.from_, each.to))
    for each in slices
    for name in (names[each.splitname],)
  ]
  if empty := [part.name for part in parts if not len(part.rows)]:
    raise UserError(
      f"{field}={spec!r} is empty: {empty[0]!r} has {lengths[empty[0]]} rows; name rows that it has"
    )
  return parts
