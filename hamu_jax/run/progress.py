"""Progress of a running stage: a progress bar, or plain lines if there is no terminal."""

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from hamu_jax.run.tables import format_number

_SHOWN = {"retain_loss": "retain_loss", "forget_loss": "forget_loss"}
_LINE = "{desc}: {n_fmt}/{total_fmt} steps, {rate_fmt}, ETA {remaining}{postfix}"


class Progress:
  """The progress of one stage, with its rate and remaining time; a context manager.

  On a terminal it is a bar that redraws itself. Elsewhere it is a plain line at the start, at the end and
  every few seconds between.
  """

  def __init__(
    self,
    stage: str,
    total: int,
    *,
    initial: int = 0,
    shown: Mapping[str, str] = _SHOWN,
    seconds_between_lines: float = 5.0,
    stream: TextIO | None = None,
    enabled: bool = True,
  ):
    """Shows the stage at its first step.

    Args:
      stage: Name of the stage.
      total: Number of steps of the stage.
      initial: Number of steps done by an earlier process, which count for the position but not for the rate.
      shown: {name of a metric to show if an update has it: its name on the display}.
      seconds_between_lines: Smallest time between two lines without a terminal, in seconds.
      stream: Stream to write to; None is stderr.
      enabled: Whether anything is shown; only one process of a multi-host run should show it.
    """
    file: Any = sys.stderr if stream is None else stream
    style: dict[str, Any] = {"dynamic_ncols": True}
    if not file.isatty():
      file = _Lines(file)
      style = {"bar_format": _LINE, "mininterval": seconds_between_lines}
    self._stage, self._shown, self._moved = stage, shown, False
    self._bar = _Bar(
      desc=stage,
      total=total,
      initial=initial,
      unit=" step",
      miniters=1,
      # The mean rate since the first update; see `update`.
      smoothing=0,
      file=file,
      disable=not enabled,
      **style,
    )

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.set_description_str(self._stage, refresh=False)
    self._bar.close()

  def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
    """Moves to `step`, counted from the start of the stage, with the metrics of the last step."""
    values = values or {}
    texts = [
      f"{label} {format_number(values[name], 4)}" for name, label in self._shown.items() if name in values
    ]
    self._bar.set_description_str(self._stage, refresh=False)
    self._bar.set_postfix_str(", ".join(texts), refresh=False)
    if not self._moved:
      self._moved = True
      # The time before the first update is that of compiling, which says nothing of the steps to come.
      self._bar.restart(step)
    self._bar.update(step - self._bar.n)

  def phase(self, name: str) -> None:
    """Says what is done between steps, such as "compiling", until the next update."""
    self._bar.set_description_str(f"{self._stage}, {name}")


class _Bar(tqdm):
  monitor_interval = 0  # no monitor thread, because updates come regularly

  def restart(self, step: int) -> None:
    """Counts rate and remaining time from this step and moment on."""
    if not self.disable:
      self.initial = step
      # tqdm takes a bar that began after its last display for one that was never displayed.
      self.start_t = self.last_print_t = self._time()


class _Lines:
  """Writes each redrawing of a bar as a line of its own."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> None:
    if text := text.strip():
      self._stream.write(text + "\n")

  def flush(self) -> None:
    self._stream.flush()
