"""Shows what a program is doing: one line that redraws itself on a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from hamu_jax.run import command_line
from hamu_jax.run.tables import format_number

_SHOWN = {"retain_loss": "retain_loss", "forget_loss": "forget_loss"}
_BAR_WIDTH = 20
_TICK_SECONDS = 1.0
# The displays that are running; only the last one is shown.
_running: list["Progress"] = []
_lock = threading.RLock()


class Progress:
  """What one stage is doing, with its clock, rate and remaining time; a context manager.

  On a terminal it is a line that redraws itself, also between updates. Elsewhere it is a plain line at the
  start, at the end and every few seconds between. A display that starts within another takes its place.
  """

  def __init__(
    self,
    stage: str,
    total: int = 0,
    *,
    initial: int = 0,
    title: str = "",
    shown: Mapping[str, str] = _SHOWN,
    seconds_between_lines: float = 5.0,
    stream: TextIO | None = None,
    enabled: bool = True,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Prepares the display, which the context shows.

    Args:
      stage: Name of the stage.
      total: Number of steps of the stage; 0 if it has none: then only its clock is shown, and nothing of it
        stays on a terminal.
      initial: Number of steps done by an earlier process, which count for the position but not for the rate.
      title: What to call the stage; "" is its name.
      shown: {name of a metric to show if an update has it: its name on the display}.
      seconds_between_lines: Smallest time between two lines without a terminal, in seconds.
      stream: Stream to write to; None is stderr.
      enabled: Whether anything is shown; only one process of a multi-host run should show it.
      clock: () -> seconds.
    """
    self._stage, self._total, self._step, self._shown = title or stage, total, initial, shown
    self._clock, self._enabled = clock, enabled
    self._phase = self._metrics = ""
    self._phases: set[str] = set()
    self._began = clock()
    # Steps and their seconds, without the first update, which has waited for compiling, and other phases.
    self._timed_steps, self._timed_seconds = 0, 0.0
    self._moved = False
    self._changed_at = self._began
    self._display = display(
      self._text, self._line, between=seconds_between_lines, stream=stream, keep=total > 0, clock=clock
    )

  def __enter__(self) -> "Progress":
    if self._enabled:
      with _lock:
        if _running:
          _running[-1]._display.pause()
        _running.append(self)
        self._display.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._enabled:
      with _lock:
        self._phase = ""
        was_shown = _running[-1] is self
        _running.remove(self)
        self._display.stop()
        if was_shown and _running:
          _running[-1]._display.start()

  def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
    """Moves to `step`, counted from the start of the stage, with the metrics of the last step."""
    values, now = values or {}, self._clock()
    if self._moved:
      self._timed_steps += step - self._step
      self._timed_seconds += now - self._changed_at
    self._step, self._phase, self._moved, self._changed_at = step, "", True, now
    self._metrics = ", ".join(
      f"{label} {format_number(values[name], 4)}" for name, label in self._shown.items() if name in values
    )
    self._changed()

  def phase(self, name: str) -> None:
    """Says what is done beside steps, such as "evaluating", until the next update; "" for steps."""
    self._phase, self._changed_at = name, self._clock()
    # Phases that alternate with steps are not news each time.
    is_new = bool(name) and name not in self._phases
    self._phases.add(name)
    self._changed(at_once=is_new)

  def _changed(self, *, at_once: bool = False) -> None:
    with _lock:
      if _running and _running[-1] is self:
        self._display.changed(at_once=at_once)

  def _title(self) -> str:
    return ", ".join(filter(None, (self._stage, self._phase)))

  def _position(self) -> str:
    return f"{self._step}/{self._total} steps" if self._total else ""

  def _details(self) -> list[str]:
    """The clock, the rate, the remaining time and the metrics, as far as they are known."""
    elapsed = self._clock() - self._began
    found = [clock_text(elapsed)] if elapsed >= 1 else []
    if self._timed_steps > 0:
      seconds = max(self._timed_seconds / self._timed_steps, 1e-9)
      found.append(f"{seconds:.3g} s/step" if seconds > 1 else f"{1 / seconds:.3g} steps/s")
      if self._step < self._total:
        found.append(f"{clock_text((self._total - self._step) * seconds)} left")
    return found + [self._metrics] * bool(self._metrics)

  def _text(self) -> str:
    facts = [*filter(None, [self._position()]), *self._details()]
    return ": ".join(filter(None, (self._title(), ", ".join(facts))))

  def _line(self) -> RenderableType:
    if not self._total:
      return Text(self._text(), no_wrap=True, overflow="ellipsis")
    title, position = self._title(), self._position()
    line = Table.grid(padding=(0, 1), expand=True)
    for width in (len(title), _BAR_WIDTH, len(position)):
      line.add_column(no_wrap=True, min_width=width)
    # The terminal cuts only the last column, which has the metrics at its end.
    line.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    bar = ProgressBar(self._total, self._step, width=_BAR_WIDTH)
    line.add_row(Text(title), bar, Text(position), Text(", ".join(self._details())))
    return line


def starting(arguments: Sequence[str]) -> Progress:
  """The display of a program while it imports its libraries, which takes seconds.

  Processes of one run do not know yet which of them writes, so that these show nothing.

  Args:
    arguments: the program's arguments.
  """
  quiet = command_line.asks_for_help(arguments) or any(
    each.startswith("--config.distributed.") for each in arguments
  )
  return before_run("starting", enabled=not quiet)


def before_run(doing: str, *, enabled: bool) -> Progress:
  """The display of what comes before a run, in which it can still be refused.

  It is on stdout, since a program that refuses its input says no more than one line on stderr.
  """
  return Progress(doing, stream=sys.stdout, enabled=enabled)


def clock_text(seconds: float) -> str:
  """A duration as minutes and seconds, or hours, minutes and seconds."""
  minutes, second = divmod(round(seconds), 60)
  hours, minute = divmod(minutes, 60)
  return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Display(Protocol):
  """Shows what changes, between `start` and `stop`."""

  def start(self) -> None:
    """Starts the display, or goes on after a pause."""

  def pause(self) -> None:
    """Shows nothing until the next start."""

  def stop(self) -> None:
    """Ends the display."""

  def changed(self, *, at_once: bool = False) -> None:
    """Tells the display that there is something new, and whether to show it at once."""


def display(
  text: Callable[[], str],
  content: Callable[[], RenderableType],
  *,
  between: float,
  stream: TextIO | None = None,
  keep: bool = False,
  clock: Callable[[], float] = time.monotonic,
) -> Display:
  """A display on a stream, which redraws itself on a terminal.

  Args:
    text: () -> lines to show elsewhere; nothing is shown for "".
    content: () -> lines to show on a terminal.
    between: smallest time between two texts, in seconds.
    stream: stream to write to; None is stderr.
    keep: whether the lines stay on the terminal at the end.
    clock: () -> seconds.
  """
  stream = sys.stderr if stream is None else stream
  if stream.isatty():
    # Messages of others that are longer than a line stay whole.
    console = Console(file=stream, force_terminal=True, soft_wrap=True)
    if not console.is_dumb_terminal:
      return _Redrawn(console, content, keep)
  return _Plain(stream, text, between, clock)


class _Plain:
  """Lines without control characters, at least some seconds apart."""

  def __init__(self, stream: TextIO, text: Callable[[], str], between: float, clock: Callable[[], float]):
    self._stream, self._text, self._between, self._clock = stream, text, between, clock
    self._said, self._said_at = "", clock()
    self._over = threading.Event()

  def start(self) -> None:
    self._over = threading.Event()
    if not self._said:
      self._say()
    threading.Thread(target=self._tick, args=(self._over,), daemon=True).start()

  def pause(self) -> None:
    self._over.set()

  def stop(self) -> None:
    self._over.set()
    self._say()

  def changed(self, *, at_once: bool = False) -> None:
    if at_once or self._clock() - self._said_at >= self._between:
      self._say()

  def _tick(self, over: threading.Event) -> None:
    """Says how long it has taken so far while nothing changes, such as during a compilation."""
    while not over.wait(_TICK_SECONDS):
      with _lock:
        if not over.is_set():
          self.changed()

  def _say(self) -> None:
    if (text := self._text()) and text != self._said:
      self._stream.write(f"{text}\n")
      self._stream.flush()
      self._said, self._said_at = text, self._clock()


class _Redrawn:
  """Lines at the foot of a terminal that redraw themselves several times a second."""

  def __init__(self, console: Console, content: Callable[[], RenderableType], keep: bool):
    self._console, self._content, self._keep = console, content, keep
    self._live: Live | None = None

  def start(self) -> None:
    self._live = self._show(transient=not self._keep)

  def pause(self) -> None:
    if self._live is not None:
      self._live.transient = True
      self.stop()

  def stop(self) -> None:
    live, self._live = self._live, None
    if live is not None:
      live.stop()

  def changed(self, *, at_once: bool = False) -> None:
    pass  # The lines redraw themselves.

  def _show(self, transient: bool) -> Live:
    live = _Live(
      console=self._console,
      get_renderable=self._content,
      transient=transient,
      redirect_stdout=sys.stdout.isatty(),
      redirect_stderr=sys.stderr.isatty(),
    )
    live.start(refresh=True)
    # A process that is killed could not show it again.
    self._console.show_cursor(True)
    return live


class _Live(Live):
  """Leaves the cursor at the start of its last line, where messages of other libraries then begin.

  XLA writes to the terminal itself. Its message takes the place of the line, which is drawn again below.
  """

  def process_renderables(self, renderables):
    return [*super().process_renderables(renderables), Control(ControlType.CARRIAGE_RETURN)]
