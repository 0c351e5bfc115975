"""Locks of files that name their holder.

The system releases a lock when its holder ends, however it ends, so a lock is never stale: the name that a
dead process has left in the file only counts while the lock is held.
"""

import fcntl
import io
import os
import pathlib
import socket

from hamu_jax.errors import UserError
from hamu_jax.run import disk


def try_lock(path: pathlib.Path, remedy: str = "choose another folder") -> io.FileIO | None:
  """Opens and locks a file, and writes host and process id into it.

  Args:
    path: file, created with its folder if it is missing.
    remedy: what the user can do if the file system has no locks.

  Returns:
    The file, which is locked until it is closed; None if another process holds the lock.

  Raises:
    UserError: the file cannot be written or locked.
  """
  with disk.writing(f"cannot write {path}", "make room or choose another folder"):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b", buffering=0)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    return None
  except OSError as error:
    file.close()
    raise UserError(f"cannot lock {path}: {error.strerror}; {remedy} on a file system with locks") from error
  try:
    file.truncate(0)
    file.write(this_process().encode())
  except OSError:
    pass  # On a full disk the lock has no name, but it holds.
  return file


def this_process() -> str:
  """The name of this process."""
  return f"process {os.getpid()} on {socket.gethostname()}"


def holder(path: pathlib.Path) -> str:
  """Who holds the lock of a file, such as "process 7 on node1"."""
  try:
    return path.read_text(errors="replace")[:200].strip() or "another process"
  except OSError:
    return "another process"
