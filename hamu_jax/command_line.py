"""What the programs of this project have in common: bad input is one line and an exit status."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import logging

from hamu_jax.errors import UserError

BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
  """One whose complaints are `UserError`s, and which takes options by their whole names only."""

  def __init__(self, **options):
    super().__init__(
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

  def error(self, message: str) -> NoReturn:
    raise UserError(message)


def run(program: Callable[[], int | None]) -> int:
  """Runs a program that raises a `UserError` for bad input.

  Args:
    program: what it does; returns its exit status, or None for 0.

  Returns:
    The exit status; 2 for bad input, of which one line is printed.
  """
  logging.set_verbosity(logging.WARNING)
  try:
    return program() or 0
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT
