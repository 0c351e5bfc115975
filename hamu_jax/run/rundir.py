"""The run directory: all output of a run, and the only module that writes metrics.

    config.json     the resolved configuration
    metrics.jsonl   one JSON object per line: stage, step, split, then the values
    summary.json    results, steps, stop reason, seconds and provenance
    tb/<stage>/     TensorBoard events
    wandb.json      the Weights & Biases run id, when config.wandb asks for it
    checkpoints/    orbax; beside it the plots

All JSON is strict: NaN and infinities, which JSON cannot represent, are written as null. JSON
files are replaced atomically. Metrics are appended, so a killed process leaves at most one
truncated last line, which `metrics_log.read_metrics` reports and the next `RunDir.open` removes.
"""

import io
import json
import math
import os
import pathlib
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hamu_jax import outside
from hamu_jax.errors import UserError
from hamu_jax.run import digests, lock
from hamu_jax.run.disk import writing
from hamu_jax.run.metrics_log import read_metrics
from hamu_jax.run.sinks import Sink, Sinks, TensorBoardSink, WandbSink

# What a sweep and the preview leave in a folder before a run starts there.
_LEFT_BEFORE = (
  "output.txt",
  "stages",
  "checkpoints",
  "evaluation.json",
  "examples",
  "hardness.json",
  "hardness.png",
  "hardness.pdf",
)


def jsonable(value: Any) -> Any:
  """Converts a value to plain JSON: finite numbers, lists and dicts with string keys.

  Args:
    value: Nested mappings and sequences of strings, numbers, None, paths, NumPy and JAX arrays.

  Returns:
    The same structure, with lists for arrays and tuples, and None for NaN and infinities.

  Raises:
    TypeError: for a value of any other type.
  """
  if value is None or isinstance(value, (str, bool, int)):
    return value
  if isinstance(value, float):
    return float(value) if math.isfinite(value) else None
  if isinstance(value, Mapping):
    return {str(key): jsonable(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [jsonable(item) for item in value]
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if isinstance(value, (np.ndarray, np.generic, jax.Array)):
    array = np.asarray(value)
    # Extension floats such as bfloat16 have no Python counterpart, so they become float first.
    return jsonable(array.tolist() if array.dtype.kind in "biuf" else array.astype(float).tolist())
  raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def write_json(path: os.PathLike | str, value: Any) -> None:
  """Writes `value` as JSON so that `path` holds the old or the new content, never a part.

  Args:
    path: The file; its folder must exist.
    value: Any value that `jsonable` accepts.

  Raises:
    UserError: if the disk is full or the folder is not writable.
  """
  write_bytes(path, (json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: os.PathLike | str, data: bytes) -> None:
  """Writes a file so that `path` holds the old or the new content, never a part.

  Args:
    path: The file; its folder must exist.
    data: The content.

  Raises:
    UserError: if the disk is full or the folder is not writable.
  """
  path = pathlib.Path(path)
  # The name is fixed, so that a file left by a killed process is overwritten.
  partial = path.with_name(f".{path.name}.partial")
  with writing(path):
    try:
      with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
      os.replace(partial, path)
    except OSError:
      partial.unlink(missing_ok=True)  # It would make a full disk fuller.
      raise


def write_arrays(path: os.PathLike | str, **arrays: np.ndarray) -> None:
  """Writes an `.npz` so that `path` holds the old or the new content, never a part.

  Args:
    path: The file; its folder must exist.
    **arrays: Arrays by name.

  Raises:
    UserError: if the disk is full or the folder is not writable.
  """
  buffer = io.BytesIO()
  # For the type checker, a name could be one of NumPy's own keywords.
  np.savez(buffer, **arrays)  # type: ignore[arg-type]
  write_bytes(path, buffer.getvalue())


def read_json(path: os.PathLike | str) -> Any:
  """Reads a JSON object of a run directory.

  Raises:
    UserError: if the file is missing, cannot be read, or holds anything else.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise UserError(f"{path} does not exist; choose the --workdir of a run")
  return outside.read_json(path, dict, "delete it or choose another --workdir")


class RunDir:
  """The directory of one run, opened for writing.

  Methods that write do nothing if `writer` is False, so that all processes of a multi-host run can call them
  while only one writes.
  """

  def __init__(self, path: os.PathLike | str, *, writer: bool = True, sinks: Sequence[Sink] = ()):
    """Wraps an existing directory. Use `open` to start or resume a run.

    Args:
      path: The directory.
      writer: Whether this process writes.
      sinks: Receivers of every metrics row, in addition to metrics.jsonl.
    """
    self.path = pathlib.Path(path)
    self.writer = writer
    self._sinks = Sinks(sinks)
    self._metrics: io.FileIO | None = None
    self._lock: io.FileIO | None = None
    # The stages that have rows.
    self._logged: set[str] = set()

  @classmethod
  def open(
    cls,
    path: os.PathLike | str,
    config: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    writer: bool = True,
  ) -> "RunDir":
    """Starts a run in `path`, or resumes the existing one.

    Args:
      path: The directory, created if it is missing.
      config: The resolved configuration. Its section ``wandb`` (project, name, entity, mode, tags, ...) adds
        the Weights & Biases sink if ``project`` is not empty.
      defaults: Configuration with the values of fields that the existing config.json lacks, because a
        version with fewer fields wrote it.
      ignore: Dotted names of fields or sections that may differ from the existing run, e.g.
        ``("wandb", "log.every")``; the file then gets the new values.
      writer: Whether this process writes.

    Returns:
      The run directory, with config.json written and TensorBoard as a sink.

    Raises:
      UserError: if the directory belongs to another experiment or cannot be written.
    """
    path, config = pathlib.Path(path), jsonable(config)
    with writing(path):
      if (path / "config.json").exists():
        there = dict(fields(jsonable(defaults))) if defaults else {}
        there |= dict(fields(read_json(path / "config.json")))
        _same_experiment(path, there, dict(fields(config)), ignore)
      elif writer:
        refuse_foreign(path)
      if not writer:
        return cls(path, writer=False)
      path.mkdir(parents=True, exist_ok=True)
    held = _hold(path)
    write_json(path / "config.json", config)
    sinks: list[Sink] = [TensorBoardSink(path / "tb")]
    if config.get("wandb", {}).get("project"):
      if not (path / "wandb.json").exists():
        write_json(path / "wandb.json", {"id": uuid.uuid4().hex})
      run_id = read_json(path / "wandb.json").get("id")
      if not isinstance(run_id, str):
        raise UserError(f"{path / 'wandb.json'} holds no id; delete it to start another run at wandb")
      sinks.append(WandbSink(config, directory=path, run_id=run_id))
    run = cls(path, sinks=sinks)
    run._lock = held
    run._repair()
    return run

  def write(self, stage: str, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Appends one row to metrics.jsonl and passes it to every sink.

    Args:
      stage: ``pretrain``, ``retrain``, ``unlearn`` or ``evaluate``.
      step: Number of steps of the stage so far, including the step that the row describes.
      split: ``retain``, ``forget`` or ``test`` for evaluations; ``step`` for the diagnostics of a step.
      values: Numbers, lists or arrays by name.

    Raises:
      UserError: if the disk is full or the directory is not writable.
    """
    if not self.writer:
      return
    values = jsonable(values)
    row: dict[str, Any] = {"stage": stage, "step": int(step), "split": split}
    if taken := row.keys() & values.keys():
      raise ValueError(f"metrics may not be called {', '.join(sorted(taken))}")
    line = memoryview((json.dumps({**row, **values}, allow_nan=False) + "\n").encode())
    with writing(self.path / "metrics.jsonl"):
      if self._metrics is None:
        self._metrics = open(self.path / "metrics.jsonl", "ab", buffering=0)
      while line:
        line = line[self._metrics.write(line) :]
    self._logged.add(stage)
    self._sinks.write(stage, row["step"], split, values)

  def write_evaluation(self, stage: str, step: int, summary: Mapping[str, Any]) -> None:
    """Writes the rows of an evaluated model: one for each split, and one for values over several splits.

    Args:
      stage: See `write`.
      step: See `write`.
      summary: Values by split and name, and values over several splits by name.
    """
    for split, values in summary.items():
      if isinstance(values, Mapping):
        self.write(stage, step, split, values)
    over_splits = {name: value for name, value in summary.items() if not isinstance(value, Mapping)}
    self.write(stage, step, "evaluation", over_splits)

  def restore(
    self,
    stage: str,
    step: int,
    *,
    last: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    evaluated: int,
  ) -> None:
    """Writes what is known of a stage whose rows are lost, and says so; nothing if it has rows.

    Args:
      stage: The stage, which has run in this directory.
      step: Its step.
      last: The values of this step; {} if they are not known.
      evaluation: Its last evaluation, see `write_evaluation`; {} without one.
      evaluated: The step of this evaluation.
    """
    if not self.writer or stage in self._logged:
      return
    print(
      f"note: {self.path / 'metrics.jsonl'} has no rows of {stage}: those of its {step} steps are gone, "
      "except for what a checkpoint or the stage cache holds of the last one",
      file=sys.stderr,
      flush=True,
    )
    if last:
      self.write(stage, step, "step", last)
    if evaluation:
      self.write_evaluation(stage, evaluated, evaluation)

  def truncate(self, stage: str, step: int, *, evaluated: int | None = None) -> None:
    """Removes the rows that a resumed stage will write again, and a truncated last line.

    Args:
      stage: The stage that resumes.
      step: The step from which it resumes; its later rows are removed. -1 if it starts over.
      evaluated: The step of the last evaluation that it will not repeat; later rows of splits other than
        ``step`` are removed. None means `step`.
    """
    last = {"step": step}
    evaluated = step if evaluated is None else evaluated
    self._keep(lambda row: row["stage"] != stage or row["step"] <= last.get(row["split"], evaluated))
    self._sinks.rewind(stage, step)

  def write_json(self, name: str, value: Any) -> None:
    """Writes the JSON file `name`, e.g. ``summary.json``; see the function `write_json`."""
    if self.writer:
      write_json(self.path / name, value)

  def close(self) -> None:
    """Closes the metrics file and every sink, and lets other processes use the directory."""
    self._close_metrics()
    self._sinks.close()
    if self._lock is not None:
      self._lock.close()

  def _close_metrics(self) -> None:
    if self._metrics is not None:
      self._metrics.close()
      self._metrics = None

  def _repair(self) -> None:
    """Removes all but rows from metrics.jsonl, and keeps a copy unless that is only a truncated last line."""
    path = self.path / "metrics.jsonl"
    rows, _, damaged = read_metrics(path)
    if damaged:
      content = path.read_bytes()
      digests.set_aside(path, f"{damaged} lines are no rows", f"the other {len(rows)} lines are used")
      write_bytes(path, content)
    self._keep(lambda row: True)

  def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites metrics.jsonl with the wanted rows, if that changes it."""
    path = self.path / "metrics.jsonl"
    if not self.writer or not path.exists():
      return
    self._close_metrics()
    rows = [row for row in read_metrics(path).rows if wanted(row)]
    self._logged = {row["stage"] for row in rows}
    kept = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    if kept.encode() != path.read_bytes():
      write_bytes(path, kept.encode())


def _hold(path: pathlib.Path) -> io.FileIO | None:
  """Locks a run directory for this process; None if this process has it already."""
  file = path / ".lock"
  held = lock.try_lock(file, "choose a --workdir")
  if held is None and (holder := lock.holder(file)) != lock.this_process():
    raise UserError(f"workdir {path} is in use by {holder}; wait until it ends, or choose another --workdir")
  return held


def refuse_foreign(path: pathlib.Path) -> None:
  """Raises a UserError if a folder without the configuration of a run holds the files of somebody else."""
  names = sorted(each.name for each in path.iterdir()) if path.is_dir() else []
  foreign = [name for name in names if name not in _LEFT_BEFORE and not name.startswith(".")]
  if foreign and "config.json" not in names:
    raise UserError(
      f"workdir {path} is not a run directory: it holds {foreign[0]!r} ({len(foreign)} such) and no "
      "config.json of a run; choose another --workdir, or an empty one"
    )


def _same_experiment(
  path: pathlib.Path, there: Mapping[str, Any], here: Mapping[str, Any], ignore: Sequence[str]
) -> None:
  differing = [
    name
    for name in sorted(there.keys() | here.keys())
    if (name not in there or name not in here or there[name] != here[name])
    and not any(name == field or name.startswith(field + ".") for field in ignore)
  ]
  if not differing:
    return

  def show(fields, name):
    return json.dumps(fields[name]) if name in fields else "absent"

  first = "; ".join(
    f"config.{name} is {show(there, name)} there and {show(here, name)} here" for name in differing[:3]
  )
  more = f"; and {len(differing) - 3} more fields differ" if len(differing) > 3 else ""
  raise UserError(
    f"workdir {path} belongs to another experiment: {first}{more}; choose another --workdir or delete {path}"
  )


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the leaves of nested dicts with their dotted names; an empty dict is a leaf."""
  if isinstance(config, Mapping) and config:
    for name, value in config.items():
      yield from fields(value, f"{prefix}.{name}" if prefix else name)
  else:
    yield prefix, config
