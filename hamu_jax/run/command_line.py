"""What the programs of this project have in common: bad input is one line and an exit status."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import logging

from hamu_jax.errors import UserError
from hamu_jax.run.preemption import Preempted

BAD_INPUT = 2
TERMINATED = 128 + 15


class Parser(argparse.ArgumentParser):
  """One whose complaints are `UserError`s, and which takes options by their whole names only."""

  def __init__(self, **options):
    super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

  def error(self, message: str) -> NoReturn:
    raise UserError(message)


def run(program: Callable[[], int | None]) -> int:
  """Runs a program that raises a `UserError` for bad input, and `Preempted` where it was asked to end.

  Args:
    program: what it does; returns its exit status, or None for 0.

  Returns:
    The exit status; 2 for bad input, of which one line is printed. An interruption ends the process with 143.
  """
  logging.set_verbosity(logging.WARNING)
  try:
    return program() or 0
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT
  except Preempted:
    print("interrupted: progress is saved; run the same command to go on", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # A device program may still be running in a thread that cannot be ended.
    os._exit(TERMINATED)
