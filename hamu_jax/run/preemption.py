"""Notices SIGTERM and SIGINT while the device is busy.

Python runs a signal handler only between bytecodes of the main thread, so a main thread inside a long
compilation or device program would notice a signal too late. Such work therefore runs in a worker thread,
while the main thread waits for it and for signals.
"""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

_POLL_SECONDS = 0.02


class Preempted(Exception):
  """The run was asked to end; the steps applied so far are saved or can be saved."""


class Watch:
  """A context in which SIGTERM and SIGINT set `requested` instead of ending the process.

  Args:
    grace_seconds: time in seconds for which running work may continue after the request.
  """

  def __init__(self, grace_seconds: float = 4.0):
    self._grace_seconds = grace_seconds
    self._requested_at: float | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._request)
    return self

  def __exit__(self, *exception):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _request(self, number, frame):
    del frame
    if self._requested_at is None:
      self._requested_at = time.monotonic()
    elif number == signal.SIGINT:
      raise KeyboardInterrupt  # A second Ctrl-C means that the user does not want to wait.

  @property
  def requested(self) -> bool:
    """Whether the run was asked to end."""
    return self._requested_at is not None

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
