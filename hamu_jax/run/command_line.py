"""The common command line of the programs: bad input gives one line of error and an exit status."""

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
  """A parser that raises `UserError` for bad input and does not accept abbreviated options."""

  def __init__(self, **options):
    super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

  def error(self, message: str) -> NoReturn:
    raise UserError(message)


def run(program: Callable[[], int | None]) -> int:
  """Runs a program and turns its `UserError` or `Preempted` into a line of text and an exit status.

  Args:
    program: function that returns the exit status, or None for 0. It raises `UserError` for bad input and
      `Preempted` if it was asked to end.

  Returns:
    The exit status; 2 for bad input, for which one line is printed. An interruption exits with status 143.
  """
  logging.set_verbosity(logging.WARNING)
  try:
    return program() or 0
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT
  except Preempted:
    print("interrupted: progress is saved; run the same command to resume", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # A device program may still be running in a thread that cannot be stopped.
    os._exit(TERMINATED)
