"""Errors of writing, whatever library raises them, as one line with a remedy."""

import contextlib
import os
import re
from collections.abc import Iterator

from hamu_jax.errors import UserError, first_line

_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large|Read-only file system")
# Tensorstore raises a ValueError that begins with the name of a status.
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")


def reason_of(error: BaseException) -> str | None:
  """Why a file could not be written, in a few words; None if that is not what the error is about."""
  if isinstance(error, UserError):
    return None
  if isinstance(error, OSError):
    return error.strerror or first_line(error)
  text = first_line(error)
  is_status = isinstance(error, ValueError) and _STATUS.match(text)
  if not is_status and type(error).__name__ != "SafetensorError":
    return None
  # The system's own words are within the library's message.
  words = _FULL.search(text)
  return words[0] if words else text[:200]


def is_full(error: BaseException) -> bool:
  """Whether a disk or a quota is full, or the disk cannot be written at all."""
  reason = reason_of(error)
  return reason is not None and _FULL.search(reason) is not None


@contextlib.contextmanager
def writing(what: os.PathLike | str, remedy: str = "make room or choose another --workdir") -> Iterator[None]:
  """Turns errors of writing in its body into a `UserError`.

  Args:
    what: path that is written, or a text that says what could not be done.
    remedy: what the user can do.
  """
  try:
    yield
  except Exception as error:  # Only those that are about writing, see `reason_of`.
    if (reason := reason_of(error)) is None:
      raise
    if isinstance(what, str):
      raise UserError(f"{what} ({reason}); {remedy}") from error
    path = getattr(error, "filename", None) or what
    raise UserError(f"cannot write {path}: {reason}; {remedy}") from error
