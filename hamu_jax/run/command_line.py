"""The common command line of the programs: bad input gives one line of error and an exit status."""

import argparse
import contextlib
import logging as logger
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import logging

from hamu_jax.errors import UserError
from hamu_jax.run import disk, preemption

BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
  """A parser that raises `UserError` for bad input and does not accept abbreviated options."""

  def __init__(self, **options):
    super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

  def parse_known_args(self, args=None, namespace=None):
    """Parses options, none of which may be given twice."""
    given = [each.partition("=")[0] for each in args or () if each.startswith("--")]
    for option in given:
      if given.count(option) > 1:
        self.error(f"{option}: is given twice; leave one out")
    return super().parse_known_args(args, namespace)

  def error(self, message: str) -> NoReturn:
    raise UserError(message)


def asks_for_help(arguments: Sequence[str]) -> bool:
  """Whether a program is to print its help only."""
  return not {"--help", "-h"}.isdisjoint(arguments)


def run(
  program: Callable[[], int | None],
  arguments: Sequence[str] = (),
  help_text: Callable[[], str | None] | None = None,
) -> int:
  """Runs a program and turns its `UserError` or `Preempted` into a line of text and an exit status.

  Args:
    program: function that returns the exit status, or None for 0. It raises `UserError` for bad input and
      `Preempted` if it was asked to end.
    arguments: its arguments, if it has a `help_text`.
    help_text: () -> what is printed instead of running it if the arguments ask for help; None if the
      program's own parser prints help.

  Returns:
    The exit status; 2 for bad input, for which one line is printed. An interruption ends the process with
    143, or with 130 if it was Ctrl-C.
  """
  if help_text is not None and asks_for_help(arguments):
    print(help_text())
    return 0
  logging.set_verbosity(logging.WARNING)
  # Orbax and tensorstore leave tasks behind if a write fails, and asyncio prints a traceback for each.
  logger.getLogger("asyncio").setLevel(logger.CRITICAL)
  try:
    try:
      # A program that has something to save has a watch of its own.
      with preemption.Watch() as watch, watch.nothing_to_save():
        return program() or 0
    except Exception as error:  # Where nobody else has said that the disk is full.
      if not disk.is_full(error):
        raise
      path = getattr(error, "filename", None) or "a file"
      raise UserError(
        f"cannot write {path}: {disk.reason_of(error)}; make room, then run the same command again"
      ) from error
  except UserError as error:
    # The output may be a file on the full disk.
    with contextlib.suppress(OSError):
      print(f"error: {error}", file=sys.stderr, flush=True)
    return BAD_INPUT
  except preemption.Preempted:
    with contextlib.suppress(OSError):
      sys.stdout.flush()
      sys.stderr.flush()
    preemption.leave("progress is saved; run the same command to resume")
