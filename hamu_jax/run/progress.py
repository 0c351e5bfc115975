"""Progress of a running stage: a progress bar, or plain lines if there is no terminal."""

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from hamu_jax.run.tables import format_number

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
    shown: tuple[str, ...] = ("retain_loss", "forget_loss"),
    seconds_between_lines: float = 5.0,
    stream: TextIO | None = None,
    enabled: bool = True,
  ):
    """Shows the stage at its first step.

    Args:
      stage: Name of the stage.
      total: Number of steps of the stage.
      initial: Number of steps done by an earlier process, which count for the position but not for the rate.
      shown: Names of the metrics to show if an update has them.
      seconds_between_lines: Smallest time between two lines without a terminal, in seconds.
      stream: Stream to write to; None is stderr.
      enabled: Whether anything is shown; only one process of a multi-host run should show it.
    """
    file: Any = sys.stderr if stream is None else stream
    style: dict[str, Any] = {"dynamic_ncols": True}
    if not file.isatty():
      file = _Lines(file)
      style = {"bar_format": _LINE, "mininterval": seconds_between_lines}
    self._shown = shown
    self._bar = _Bar(
      desc=stage,
      total=total,
      initial=initial,
      unit=" step",
      miniters=1,
      file=file,
      disable=not enabled,
      **style,
    )

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.close()

  def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
    """Moves to `step`, counted from the start of the stage, with the metrics of the last step."""
    values = values or {}
    texts = [f"{name} {format_number(values[name], 4)}" for name in self._shown if name in values]
    self._bar.set_postfix_str(", ".join(texts), refresh=False)
    self._bar.update(step - self._bar.n)


class _Bar(tqdm):
  monitor_interval = 0  # no monitor thread, because updates come regularly


class _Lines:
  """Writes each redrawing of a bar as a line of its own."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> None:
    if text := text.strip():
      self._stream.write(text + "\n")

  def flush(self) -> None:
    self._stream.flush()
