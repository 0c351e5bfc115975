"""Timing of functions that take turns, so that their ratios are meaningful on a noisy machine."""

import statistics
import time

import jax

from hamu_jax.run import tables


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
