"""What a run shows while it works: a progress bar, or plain lines where there is no terminal."""

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from hamu_jax.run.tables import format_number

_LINE = "{desc}: {n_fmt}/{total_fmt} steps, {rate_fmt}, ETA {remaining}{postfix}"


class Progress:
  """The progress of one stage, with rate and time to go; a context manager.

  On a terminal a bar that redraws itself; anywhere else a plain line every few seconds, one at the
  start and one at the end.
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
      stage: Its name.
      total: Its steps.
      initial: Steps done by an earlier process, which count for the position but not for the rate.
      shown: Names of the metrics to show, where an update has them.
      seconds_between_lines: Off a terminal, the least time between two lines.
      stream: Where to write; None is stderr.
      enabled: False shows nothing, for all but one process of a multi-host run.
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
    """Moves to `step`, an absolute position, with the metrics of its last step."""
    values = values or {}
    texts = [f"{name} {format_number(values[name], 4)}" for name in self._shown if name in values]
    self._bar.set_postfix_str(", ".join(texts), refresh=False)
    self._bar.update(step - self._bar.n)


class _Bar(tqdm):
  monitor_interval = 0  # no watcher thread: updates come regularly


class _Lines:
  """Turns the carriage returns of a bar into lines."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> None:
    if text := text.strip():
      self._stream.write(text + "\n")

  def flush(self) -> None:
    self._stream.flush()
