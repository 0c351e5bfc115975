"""Timing of functions that take turns, so that their ratios are meaningful on a noisy machine."""

import os
import statistics
import time

import jax

from hamu_jax.run import tables

_DISTURBED = 0.05
_MOST_TRIES = 4


def seconds_of(function):
  """Seconds of one call, until its results are computed."""
  began = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - began


def interleave(functions, rounds):
  """Seconds of each function in each round, and of its first call, which compiles it.

  Args:
    functions: {name: function without arguments}.
    rounds: number of calls of each function after its first call.

  Returns:
    ({name: [rounds] seconds}, {name: seconds of the first call}).
  """
  first = {name: seconds_of(function) for name, function in functions.items()}
  seconds = {name: [] for name in functions}
  for _ in range(rounds):
    for name, function in functions.items():
      seconds[name].append(seconds_of(function))
  return seconds, first


def spread(values):
  """Median and range."""
  ordered = sorted(values)
  return {"median": statistics.median(values), "low": ordered[0], "high": ordered[-1]}


def ratios(seconds, base):
  """Spread of each function's seconds, and of their ratios, round by round, to those of `base`."""

  def of_base(values):
    return [value / floor for value, floor in zip(values, seconds[base], strict=True)]

  return {
    name: {"seconds": spread(values), "ratio": spread(of_base(values))} for name, values in seconds.items()
  }


def ratios_table(results, base, **columns):
  """Formats the results of `ratios` as aligned columns.

  Args:
    results: result of `ratios`.
    base: the argument `base` of `ratios`.
    **columns: further columns, each {name of a function: cell}.
  """
  table = []
  for name, result in results.items():
    ratio = result["ratio"]
    cells = [
      f"{result['seconds']['median']:.3f}",
      *(f"{ratio[key]:.3f}" for key in ("median", "low", "high")),
    ]
    table.append([name, *cells, *(column.get(name, "") for column in columns.values())])
  header = ["", "median s", f"ratio to {base}", "low", "high"]
  return tables.format_table([*header, *(name.replace("_", " ") for name in columns)], table)


def _busy_seconds():
  """Seconds that all processors of this machine have been busy so far, and those of this process."""
  user, nice, system, _, _, irq, softirq, *_ = map(int, open("/proc/stat").readline().split()[1:])
  return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), time.process_time()


def _timed(function):
  """Wall and CPU seconds of a call, and the share of the machine that others used meanwhile."""
  before, began = _busy_seconds(), time.perf_counter()
  jax.block_until_ready(function())
  wall, after = time.perf_counter() - began, _busy_seconds()
  cpu = after[1] - before[1]
  return wall, cpu, max(0.0, after[0] - before[0] - cpu) / (wall * os.cpu_count())


def clean_pairs(ours, theirs, rounds):
  """Times two functions that take turns, on a machine that others use as well.

  Args:
    ours: function without arguments.
    theirs: another one.
    rounds: number of pairs to find; after four times as many dropped ones there may be fewer.

  Returns:
    (pairs of (wall seconds, CPU seconds, share of the processors that others used), number of dropped pairs:
    those in which that share was above 5 %).
  """
  found, dropped = [], 0
  while len(found) < rounds and dropped < _MOST_TRIES * rounds:
    pair = _timed(ours), _timed(theirs)
    if max(share for _, _, share in pair) > _DISTURBED:
      dropped += 1
    else:
      found.append(pair)
  return found, dropped
