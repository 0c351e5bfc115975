"""Runs the members of a sweep on this machine, several at a time.

Every member is a process of `hamu_jax.main`, or shares a process of `hamu_jax.together` with others. It has a
run directory of its own, so it recovers from a crash like a single run. Two kinds of file locks coordinate
the processes. The lock of a member means that a process is running it. The lock of a stage means that a
member is computing a stage that others need, too. These wait until that member is done, and then find the
stage and the evaluation of its model in the stage cache. A process inherits its locks, so they are held until
it ends, even if its runner is killed. Other runners, such as the tasks of a SLURM job array, respect them.
"""

import io
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hamu_jax.config import default as config_lib
from hamu_jax.experiment import together
from hamu_jax.launch.expand import Member, shared_stages
from hamu_jax.report import description
from hamu_jax.report.fields import numbers_of
from hamu_jax.run import lock, preemption, progress, rundir

OUTPUT = "output.txt"
_POLL_SECONDS = 0.1
# Time that a process has to save its progress after it was asked to end.
GRACE_SECONDS = 30.0
# Without a terminal.
_SECONDS_BETWEEN_LINES = 10.0
_NAME_WIDTH = 40
# Of a process's output, to find its last line.
_MOST_BYTES = 2**16
# Share of a GPU's memory that JAX reserves by default.
_MEMORY_FRACTION = 0.75


class Failure(NamedTuple):
  """A member that did not finish."""

  name: str
  reason: str


class _Job(NamedTuple):
  """Members that run in one process."""

  members: tuple[Member, ...]
  process: subprocess.Popen
  slot: int
  started: float


def command(members: Sequence[Member], workdir: pathlib.Path) -> list[str]:
  """The command line that runs one or several members of the sweep in one process.

  Args:
    members: the members.
    workdir: folder of the sweep.
  """
  parts = [[*member.arguments, f"--workdir={workdir / member.name}"] for member in members]
  if len(parts) == 1:
    return [sys.executable, "-m", "hamu_jax.main", *parts[0]]
  joined = [argument for part in parts for argument in ("--", *part)]
  return [sys.executable, "-m", "hamu_jax.together", *joined[1:]]


def group(members: Sequence[Member], most: int) -> list[tuple[Member, ...]]:
  """Groups the members that one program can train, by `together.group_key`.

  Args:
    members: the members.
    most: largest size of a group.
  """
  by_key: dict[Any, list[Member]] = {}
  for member in members:
    key = together.group_key(member.config)
    by_key.setdefault(member.name if key is None else key, []).append(member)
  return [
    tuple(alike[first : first + most]) for alike in by_key.values() for first in range(0, len(alike), most)
  ]


def is_done(member: Member, workdir: pathlib.Path) -> bool:
  """Whether a member has its summary.

  Raises:
    UserError: if its run directory holds another experiment.
  """
  # writer=False only checks the directory.
  rundir.RunDir.open(
    workdir / member.name, member.config.to_dict(), ignore=config_lib.incidental_fields(), writer=False
  )
  # The summary is written last, and atomically.
  return (workdir / member.name / "summary.json").exists()


def find_devices() -> list[str]:
  """The available GPUs, in the syntax of CUDA_VISIBLE_DEVICES."""
  if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
    return [name for name in visible.split(",") if name]
  return [path.name.removeprefix("nvidia") for path in sorted(pathlib.Path("/dev").glob("nvidia[0-9]*"))]


def share_devices(slot: int, jobs: int, devices: Sequence[str]) -> dict[str, str]:
  """The environment variables that give the job in a slot its part of the GPUs.

  Args:
    slot: number of the slot, 0 to `jobs` - 1.
    jobs: number of jobs that run at a time.
    devices: the GPUs, see `find_devices`.
  """
  if jobs == 1 or not devices:
    return {}
  if jobs <= len(devices):
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[slot::jobs])}
  sharing = -(-jobs // len(devices))
  return {
    "CUDA_VISIBLE_DEVICES": devices[slot % len(devices)],
    "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_MEMORY_FRACTION / sharing:.3f}",
  }


class Runner:
  """Runs members and reports how each ended.

  Args:
    members: all members of the sweep; their summaries tell which stages are cached.
    workdir: folder of the sweep.
    jobs: number of processes that run at a time.
    watch: watch that notices signals.
  """

  def __init__(self, members: Sequence[Member], workdir: pathlib.Path, jobs: int, watch: preemption.Watch):
    self._members, self._workdir, self._jobs, self._watch = members, workdir, jobs, watch
    self._devices = find_devices()
    self._stages = {member.name: shared_stages(member.config) for member in members}
    self._finished: set[str] = set()
    self._total = self._ended = 0

  def run(self, chosen: Sequence[tuple[Member, ...]]) -> list[Failure]:
    """Runs all members that are not done.

    Args:
      chosen: the members to run, in groups that share a process.

    Returns:
      The members that failed, in the order in which they did.

    Raises:
      preemption.Preempted: if the runner was asked to end. The processes are asked to end, too, and save
        their progress.
    """
    self._total, self._ended = sum(map(len, chosen)), 0
    pending, waiting = list(chosen), False
    jobs: list[_Job] = []
    failures: list[Failure] = []
    shown = progress.display(
      lambda: "\n".join(": ".join(state) for state in self._states(jobs)),
      lambda: self._table(jobs),
      between=_SECONDS_BETWEEN_LINES,
    )
    try:
      shown.start()
      while pending or jobs:
        if self._watch.requested:
          raise preemption.Preempted
        pending = self._start(pending, jobs)
        if pending and not jobs and not waiting:
          print(
            f"waiting for another process that is running {pending[0][0].name}, or a stage that it needs",
            flush=True,
          )
        waiting = bool(pending) and not jobs
        time.sleep(_POLL_SECONDS)
        for job in [job for job in jobs if job.process.poll() is not None]:
          jobs.remove(job)
          failures += self._end(job)
    finally:
      shown.stop()
      _terminate(jobs)
    return failures

  def _start(self, pending: list[tuple[Member, ...]], jobs: list[_Job]) -> list[tuple[Member, ...]]:
    """Starts as many groups as locks and free slots allow; returns the others."""
    left = []
    for members in pending:
      locks = self._lock(members) if len(jobs) < self._jobs else None
      if locks is None:
        left.append(members)
        continue
      try:
        lacking = tuple(member for member in members if not is_done(member, self._workdir))
        for member in members:
          if member not in lacking:
            self._report(member, "was done before")
        if lacking:
          slot = min(set(range(self._jobs)) - {job.slot for job in jobs})
          jobs.append(_Job(lacking, self._spawn(lacking, slot, locks), slot, time.monotonic()))
      finally:
        # The process holds its own copies of the locks.
        for held in locks:
          held.close()
    return left

  def _lock(self, members: Sequence[Member]) -> list[io.FileIO] | None:
    """Locks members and their stages that are not cached; None if another process holds one of the locks."""
    locks: list[io.FileIO | None] = []
    for member in members:
      if None not in locks:
        locks.append(lock.try_lock(self._workdir / "locks" / member.name))
    cache = pathlib.Path(members[0].config.stage_cache)
    stages = {key: stage for member in members for stage, key in self._stages[member.name].items()}
    for key, stage in stages.items():
      if None in locks:
        break
      if key not in self._finished:
        held = lock.try_lock(cache / "locks" / f"{stage}-{key}")
        # The cache is checked under the lock, because another process may just have finished the stage.
        if held is not None and self._is_finished(cache, stage, key):
          self._finished.add(key)
          held.close()
        else:
          locks.append(held)
    acquired = [each for each in locks if each is not None]
    if len(acquired) == len(locks):
      return acquired
    for each in acquired:
      each.close()
    return None

  def _is_finished(self, cache: pathlib.Path, stage: str, key: str) -> bool:
    """Whether a finished member has left a stage in the cache."""
    for member in self._members:
      summary = self._workdir / member.name / "summary.json"
      if self._stages[member.name].get(stage) == key and summary.exists():
        found = description.summary_of(summary.parent) or {}
        keys = found.get("provenance", {}).get("stages", {})
        # The cache may have been emptied since. A summary does not list the many stages of an ensemble.
        if stage not in keys or (cache / f"{stage}-{keys[stage]}").exists():
          return True
    return False

  def _spawn(self, members: Sequence[Member], slot: int, locks: list[io.FileIO]) -> subprocess.Popen:
    # The output of a group is in the directory of its first member.
    folder = self._workdir / members[0].name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / OUTPUT, "ab") as output:
      return subprocess.Popen(
        command(members, self._workdir),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | share_devices(slot, self._jobs, self._devices),
        pass_fds=[held.fileno() for held in locks],
        # In a session of its own, the process gets Ctrl-C only once, through the runner.
        start_new_session=True,
      )

  def _end(self, job: _Job) -> list[Failure]:
    """Reports a process that has ended."""
    code = job.process.returncode
    seconds = f"{time.monotonic() - job.started:.0f} s"
    if len(job.members) > 1:
      seconds += f" for {len(job.members)} together"
    output = self._workdir / job.members[0].name / OUTPUT
    how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
    reason = f"{how}; {_last_line(output)} ({output})"
    failures = []
    for member in job.members:
      # Some members of a group may be done although others failed.
      if is_done(member, self._workdir) and (code == 0 or len(job.members) > 1):
        summary = description.summary_of(self._workdir / member.name)
        self._report(member, f"{describe(summary or {'results': {}})}; {seconds}")
      else:
        self._report(member, f"FAILED: {reason}")
        failures.append(Failure(member.name, reason))
    return failures

  def _states(self, jobs: Sequence[_Job]) -> list[tuple[str, str]]:
    """The name of each running process, and what it says that it is doing."""
    found = []
    for job in tuple(jobs):
      first, others = job.members[0].name, len(job.members) - 1
      seconds = progress.clock_text(time.monotonic() - job.started)
      doing = _last_line(self._workdir / first / OUTPUT)
      found.append((f"{first} and {others} more" if others else first, f"{seconds}, {doing}"))
    return found

  def _table(self, jobs: Sequence[_Job]) -> RenderableType:
    """The states of the running processes for a terminal, a line for each."""
    table = Table.grid(padding=(0, 2))
    states = self._states(jobs)
    width = min(max((len(name) for name, _ in states), default=0), _NAME_WIDTH)
    table.add_column(no_wrap=True, overflow="ellipsis", min_width=width, max_width=width)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for name, state in states:
      table.add_row(Text(name), Text(state))
    return Group(table, Text(f"{self._ended} of {self._total} ended, {len(jobs)} running"))

  def _report(self, member: Member, text: str) -> None:
    self._ended += 1
    print(f"[{self._ended:{len(str(self._total))}}/{self._total}] {member.name}: {text}", flush=True)


def describe(summary: Mapping) -> str:
  """A short text with the reason for which a run ended and the accuracies of its model."""
  numbers = dict(numbers_of(summary["results"].get("unlearned", {})))
  accuracies = {split: numbers.get(f"{split}.accuracy") for split in ("retain", "forget", "test")}
  parts = [f"{split} {100 * value:.1f} %" for split, value in accuracies.items() if value is not None]
  if "tug_of_war" in numbers:
    parts.append(f"tug of war {numbers['tug_of_war']:.3f}")
  return f"{summary.get('stop_reason', 'finished')}; {', '.join(parts)}"


def _last_line(path: pathlib.Path) -> str:
  """The last line of a process's output."""
  with open(path, "rb") as file:
    file.seek(max(0, path.stat().st_size - _MOST_BYTES))
    text = file.read().decode(errors="replace")
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  return lines[-1] if lines else "no output"


def _terminate(jobs: Sequence[_Job]) -> None:
  """Asks processes to save and end, and kills those that do not end in time."""
  for job in jobs:
    job.process.terminate()
  deadline = time.monotonic() + GRACE_SECONDS
  for job in jobs:
    try:
      job.process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      job.process.kill()
      job.process.wait()
