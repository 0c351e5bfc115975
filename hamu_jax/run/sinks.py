"""Receivers of the metrics rows in addition to metrics.jsonl: TensorBoard and Weights & Biases."""

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from hamu_jax.errors import UserError, brief


class Sink(Protocol):
  """A receiver of every metrics row of a `RunDir`."""

  def write(self, stage: str, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Receives one row; `values` are plain JSON values, None for a number that was not finite."""

  def rewind(self, stage: str, step: int) -> None:
    """Forgets the rows of `stage` beyond `step`, as far as the receiver can."""

  def close(self) -> None:
    """Flushes and releases the receiver; nothing is written afterwards."""


class Sinks:
  """Passes metrics rows on to sinks. One that fails is switched off, which is said once; the run goes on.

  Args:
    sinks: the sinks.
  """

  def __init__(self, sinks: Sequence[Sink]):
    self._sinks = list(sinks)

  def write(self, stage: str, step: int, split: str, values: Mapping[str, Any]) -> None:
    """See `Sink.write`."""
    self._each(lambda sink: sink.write(stage, step, split, values))

  def rewind(self, stage: str, step: int) -> None:
    """See `Sink.rewind`."""
    self._each(lambda sink: sink.rewind(stage, step))

  def close(self) -> None:
    """See `Sink.close`."""
    self._each(lambda sink: sink.close())

  def _each(self, call: Callable[[Sink], None]) -> None:
    for sink in tuple(self._sinks):
      try:
        call(sink)
      except Exception as error:  # A sink depends on a library, a disk and a network.
        self._sinks.remove(sink)
        with contextlib.suppress(Exception):
          sink.close()
        print(
          f"note: {type(sink).__name__} failed ({brief(error)}) and is switched off; the run "
          "goes on, and metrics.jsonl has all values",
          file=sys.stderr,
          flush=True,
        )


class TensorBoardSink:
  """TensorBoard events: numbers as scalars, lists of numbers as histograms.

  Each stage is a TensorBoard run of its own, because every stage counts its steps from zero. Events
  are written synchronously: tensorboardX's own writer passes them to a thread that dies on a full
  disk and then blocks the training loop forever.
  """

  def __init__(self, directory: pathlib.Path):
    """Prepares the sink without writing anything.

    Args:
      directory: Parent of the stages' folders, which are created with their first event.
    """
    self._directory = directory
    self._writers: dict[str, Any] = {}

  def write(self, stage: str, step: int, split: str, values: Mapping[str, Any]) -> None:
    """See `Sink.write`; None, texts and lists without a finite number are left out."""
    from tensorboardX import summary
    from tensorboardX.proto import event_pb2

    event = event_pb2.Event(wall_time=time.time(), step=step)
    for name, value in values.items():
      tag = f"{split}/{name}"
      if isinstance(value, (bool, int, float)):
        event.summary.MergeFrom(summary.scalar(tag, float(value)))
      elif numbers := _numbers(value):
        event.summary.MergeFrom(summary.histogram(tag, np.asarray(numbers, float), bins=_edges(numbers)))
    self._write(stage, event)

  def rewind(self, stage: str, step: int) -> None:
    """Writes a session start, at which TensorBoard discards the events after `step`."""
    if not (self._directory / stage).exists():
      return
    from tensorboardX.proto import event_pb2

    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(stage, event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

  def close(self) -> None:
    """See `Sink.close`."""
    writers, self._writers = self._writers, {}
    for writer in writers.values():
      writer.close()

  def _write(self, stage: str, event: Any) -> None:
    if stage not in self._writers:
      from tensorboardX.event_file_writer import EventsWriter

      folder = self._directory / stage
      folder.mkdir(parents=True, exist_ok=True)
      # The library's file names have a resolution of a second, so a quick resume would overwrite a file.
      self._writers[stage] = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
    self._writers[stage].write_event(event)
    self._writers[stage].flush()


class WandbSink:
  """Weights & Biases: the rows of every stage over that stage's own step.

  Its runs are append-only, so rows that a resumed run writes again appear twice, at equal steps.
  """

  def __init__(self, config: Mapping[str, Any], *, directory: pathlib.Path, run_id: str):
    """Starts or resumes the run.

    Args:
      config: The resolved configuration, stored with the run. Its section ``wandb`` has
        ``project``, ``name`` (empty: the directory's name), ``entity`` (empty: the account's
        default), ``mode`` (``online``, ``offline`` or ``disabled``), ``tags``, ``group`` and ``notes``.
      directory: The run directory, in which wandb keeps its files.
      run_id: Identifier of the run, by which it resumes.

    Raises:
      UserError: if wandb is not installed or does not start.
    """
    try:
      import wandb
    except ImportError as error:
      raise UserError(
        "config.wandb.project is set but wandb is not installed; "
        "pip install 'hamu-jax[wandb]' or leave config.wandb.project empty"
      ) from error
    section = config["wandb"]
    self._histogram = wandb.Histogram
    self._stages: set[str] = set()
    try:
      self._run = wandb.init(
        project=section["project"],
        name=section.get("name") or directory.name,
        entity=section.get("entity") or None,
        mode=section.get("mode") or None,
        tags=list(section.get("tags", ())) or None,
        group=section.get("group") or None,
        notes=section.get("notes") or None,
        config=dict(config),
        dir=directory,
        id=run_id,
        resume="allow",
      )
    except Exception as error:  # Before anything is computed, any reason is said.
      raise UserError(
        f"config.wandb: wandb did not start ({' '.join(str(error).split())}); "
        "log in, set config.wandb.mode to offline, or leave config.wandb.project empty"
      ) from error

  def write(self, stage: str, step: int, split: str, values: Mapping[str, Any]) -> None:
    """See `Sink.write`; None, texts and lists without a finite number are left out."""
    if stage not in self._stages:
      self._run.define_metric(f"{stage}/step")
      self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
      self._stages.add(stage)
    row: dict[str, Any] = {f"{stage}/step": step}
    for name, value in values.items():
      if isinstance(value, (bool, int, float)):
        row[f"{stage}/{split}/{name}"] = value
      elif numbers := _numbers(value):
        row[f"{stage}/{split}/{name}"] = self._histogram(numbers)
    self._run.log(row)

  def rewind(self, stage: str, step: int) -> None:
    """Does nothing, because logged rows cannot be removed."""

  def close(self) -> None:
    """See `Sink.close`."""
    self._run.finish()


def _edges(numbers: list[float]) -> np.ndarray:
  """The edges of 30 bins. NumPy's own fail if all numbers are equal and large."""
  low, high = float(min(numbers)), float(max(numbers))
  if low == high:
    return np.asarray([np.nextafter(low, -np.inf), np.nextafter(high, np.inf)])
  return np.linspace(low, high, 31)


def _numbers(value: Any) -> list[float]:
  """The numbers of a flat list; an empty list for any other value."""
  if not isinstance(value, list):
    return []
  return [item for item in value if isinstance(item, (bool, int, float))]
