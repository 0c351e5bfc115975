"""Where the time of a stage goes: compiling, steps, evaluation."""

import contextlib
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

_COMPILE_EVENT = "/jax/core/compile/"


class _Compiling:
  """Seconds that this process has spent tracing, lowering and compiling, as JAX reports them."""

  def __init__(self):
    self.seconds, self._lock, self._listens = 0.0, threading.Lock(), False

  def __call__(self) -> float:
    with self._lock:
      if not self._listens:
        jax.monitoring.register_event_duration_secs_listener(self._add)
        self._listens = True
    return self.seconds

  def _add(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith(_COMPILE_EVENT):
      with self._lock:
        self.seconds += duration_secs


_compiling = _Compiling()


class Timing:
  """Measures one run of a stage; a resumed run measures what it does itself.

  Chunks during which something compiled do not count as steady.

  Args:
    members: number of models that are trained together, which have equal shares of all seconds.
    clock: () -> seconds.
    compiling: () -> seconds spent compiling so far.
  """

  def __init__(
    self,
    members: int,
    *,
    clock: Callable[[], float] = time.monotonic,
    compiling: Callable[[], float] = _compiling,
  ):
    self._members, self._clock, self._compiling = members, clock, compiling
    self._compiled_before = compiling()
    self._chunks: list[tuple[int, float]] = []
    self._evaluating = 0.0

  @contextlib.contextmanager
  def chunk(self, steps: int) -> Iterator[None]:
    """A context that runs so many steps, until their results are there."""
    compiled, began = self._compiling(), self._clock()
    yield
    seconds = self._clock() - began
    if self._compiling() == compiled:
      self._chunks.append((steps, seconds / steps))

  @contextlib.contextmanager
  def evaluation(self) -> Iterator[None]:
    """A context that evaluates a model."""
    compiled, began = self._compiling(), self._clock()
    yield
    self._evaluating += self._clock() - began - (self._compiling() - compiled)

  def values(self, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """What was measured.

    Args:
      devices: devices of the stage, for their peak memory.

    Returns:
      - "compile_seconds": tracing, lowering and compiling, that of evaluations included.
      - "step_seconds", "step_seconds_deviation": mean and standard deviation over the steady steps, whose
        number is "steady_steps". Steps of one chunk count with its mean. None without steady steps.
      - "evaluate_seconds": evaluations on the way and at the end, without compiling them.
      - "host_memory_bytes": largest resident memory of the process so far.
      - "device_memory_bytes": largest memory in use on a device so far, if it says so.
    """
    counts, seconds = np.array(self._chunks, float).reshape(-1, 2).T
    steady = int(counts.sum())
    mean = float(counts @ seconds / steady) if steady else None
    deviation = float(np.sqrt(counts @ (seconds - mean) ** 2 / steady)) if steady else None
    found = {
      "compile_seconds": (self._compiling() - self._compiled_before) / self._members,
      "step_seconds": None if mean is None else mean / self._members,
      "step_seconds_deviation": None if deviation is None else deviation / self._members,
      "steady_steps": steady,
      "evaluate_seconds": self._evaluating / self._members,
      "host_memory_bytes": host_memory_bytes(),
    }
    # A CPU has no statistics, and those of other processes are not known here.
    own = [device for device in devices if device.process_index == jax.process_index()]
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in own]
    known = [peak for peak in peaks if peak is not None]
    return found | ({"device_memory_bytes": max(known)} if known else {})


def host_memory_bytes() -> int:
  """The largest resident memory of this process so far, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # In bytes on macOS, in KiB elsewhere.
  return peak if sys.platform == "darwin" else peak * 1024
