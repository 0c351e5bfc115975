"""Heeds SIGTERM and SIGINT in time, whatever the main thread is doing.

Python runs a signal handler only between bytecodes of the main thread, so a main thread inside a long call,
such as a compilation or the decoding of a dataset, would notice a signal too late. Python's C code, however,
writes a byte for each signal at once, and a thread reads it: see `Watch`. Work of the device runs in a worker
thread, so that the main thread can leave it behind and save.

This module imports only the standard library, so that programs can heed signals while they import the others.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_POLL_SECONDS = 0.02
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The last signal that asked this process to end.
_received: int = signal.SIGTERM


class Preempted(Exception):
  """The run was asked to end; the steps applied so far are saved or can be saved."""


def leave(line: str, number: int | None = None) -> NoReturn:
  """Ends the process at once, with the exit status of the signal: 143 for SIGTERM, 130 for SIGINT.

  Args:
    line: line to print.
    number: the signal; None for the last one that was received.
  """
  # A device program may still be running in a thread that cannot be stopped, and the main thread may hold the
  # lock of a stream.
  with contextlib.suppress(OSError):
    os.write(2, f"interrupted: {line}\n".encode())
  os._exit(128 + (_received if number is None else number))


def leave_on_signals() -> None:
  """From now on SIGTERM and SIGINT end the process at once, with one line and their exit status."""
  for number in _SIGNALS:
    signal.signal(number, lambda number, frame: leave("run the same command again", number))


class Watch:
  """A context in which SIGTERM and SIGINT set `requested`, and end a process that does not end in time.

  A second SIGINT ends it at once.

  Args:
    grace_seconds: time in seconds for which running work may continue after the request.
    longest_seconds: time in seconds after which the process is ended.
  """

  def __init__(self, grace_seconds: float = 4.0, longest_seconds: float = 8.5):
    self._grace_seconds, self._longest_seconds = grace_seconds, longest_seconds
    self._requested_at: float | None = None
    self._previous: dict[int, Any] = {}
    self._over = threading.Event()
    self._nothing_to_save = False

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      reading, self._writing = os.pipe()
      os.set_blocking(self._writing, False)
      self._previous_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
      for number in _SIGNALS:
        # With a handler in Python, the C code writes the byte. A main thread in Python is told at once.
        self._previous[number] = signal.signal(number, lambda number, frame: self._request(number))
      threading.Thread(target=self._heed, args=(reading,), daemon=True).start()
    return self

  def __exit__(self, *exception):
    self._over.set()
    if not self._previous:
      return
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._previous_fd)
    os.close(self._writing)  # This ends the thread, too.

  def _request(self, number: int) -> None:
    global _received
    _received = number
    if self._requested_at is None:
      self._requested_at = time.monotonic()

  def _heed(self, reading: int) -> None:
    """Reads the signals and ends the process when it is time."""
    count = 0
    while not self._over.is_set():
      asked = self._requested_at
      ready, _, _ = select.select([reading], [], [], None if asked is None else _POLL_SECONDS)
      for number in os.read(reading, 64) if ready else b"":
        if number in _SIGNALS:
          self._request(number)
          count += 1
          if count > 1 and number == signal.SIGINT:  # The user does not want to wait.
            leave("run the same command to resume from the last checkpoint")
      asked = self._requested_at
      if asked is None or self._over.is_set():
        continue
      if self._nothing_to_save:
        leave("run the same command again")
      if time.monotonic() - asked > self._longest_seconds:
        leave("run the same command to resume from the last checkpoint")
    os.close(reading)

  @property
  def requested(self) -> bool:
    """Whether the run was asked to end."""
    return self._requested_at is not None

  @contextlib.contextmanager
  def nothing_to_save(self) -> Iterator[None]:
    """A context in which a request ends the process at once, since nothing would be lost."""
    self._nothing_to_save = True
    try:
      yield
    finally:
      self._nothing_to_save = False

  def run(self, work: Callable[[], Any]) -> Any:
    """Runs `work` in a thread.

    Args:
      work: function without arguments.

    Returns:
      The result of `work`.

    Raises:
      Preempted: if the run was asked to end and the work did not finish within the grace period. The
        thread keeps running; the process is expected to save and exit.
    """
    outcome = {}
    finished = threading.Event()

    def target():
      try:
        outcome["value"] = work()
      except BaseException as error:  # The caller gets the error, whatever its type.
        outcome["error"] = error
      finally:
        finished.set()

    threading.Thread(target=target, daemon=True).start()
    while not finished.wait(_POLL_SECONDS):
      asked = self._requested_at
      if asked is not None and time.monotonic() - asked > self._grace_seconds:
        raise Preempted
    if "error" in outcome:
      raise outcome["error"]
    return outcome["value"]
