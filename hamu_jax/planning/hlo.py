"""What a compiled program does, read from the text of its optimized HLO.

The text has the body of a loop once; here its instructions count once an iteration.
"""

import functools
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
# An instruction: the shape of its result, then what it does.
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9-]*)\(")
_COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?")
_ARRAY = re.compile(r"([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Stands for cycles that the compiler does not know.
_UNRATED = 2**63 - 1
# What TPUs do piece by piece beside other work is several instructions with one number.
_CHAIN = re.compile(r'chain_id="(\d+)"')
_WHILE = re.compile(r"condition=%?([^\s,]+), body=%?([^\s,]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COUNTS_UP = re.compile(r"compare\([^,]*, %?([^\s)]+)\), direction=LT")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BRANCH = re.compile(r"(?:true|false)_computation=%?([^\s,]+)")
_CALL = re.compile(r"(?:calls|to_apply)=%?([^\s,]+)")


class Collective(NamedTuple):
  """An exchange between devices.

  Attributes:
    kind: such as "all-gather".
    size: bytes of its result on a device.
    times: how often it runs.
    looped: whether it stands in a loop.
  """

  kind: str
  size: int
  times: int = 1
  looped: bool = False


class Cost(NamedTuple):
  """What a program, or a part of it, does on a device.

  Attributes:
    cycles: that the compiler estimates, where it does; instructions that it does not rate, as most
      that wait for other devices, have none.
    collectives: by an identity that instructions of one collective share.
    open_loops: loops of which nothing says how often they run; counted as once.
  """

  cycles: int
  collectives: dict[str, Collective]
  open_loops: int

  @property
  def moved(self) -> int:
    """Bytes of the collectives' results."""
    return sum(one.size * one.times for one in self.collectives.values())


def read(text: str, trips: tuple[int, ...] = ()) -> Cost:
  """What a run of the program does on a device.

  Where it branches, the dearer way is taken: devices may take different ones.

  Args:
    text: `jax.stages.Compiled.as_text`.
    trips: how often loops run where the program does not say so: those that stand in no other such
      loop, those that stand in one, and so on.
  """
  computations, entry = _split(text)

  @functools.cache
  def cost(name, depth=0):
    cycles, collectives, open_loops = 0, {}, 0
    for line in computations.get(name, ()):
      instruction = _INSTRUCTION.match(line)
      if instruction is None:
        continue
      cycles += sum(count for count in map(int, _CYCLES.findall(line)) if count != _UNRATED)
      label, shape, operation = instruction.groups()
      if kind := _COLLECTIVE.fullmatch(operation):
        chain = _CHAIN.search(line)
        key = f"chain {chain[1]}" if chain else f"{name}/{label}"
        collectives[key] = Collective(kind[1], _result_bytes(shape, *kind.groups()))
      for part in _parts(line, operation, depth):
        cycles += part.cycles
        collectives |= part.collectives
        open_loops += part.open_loops
    return Cost(cycles, collectives, open_loops)

  def _parts(line, operation, depth):
    """The costs of what an instruction runs."""
    if operation == "while":
      condition, body = _WHILE.search(line).groups()
      known = _trips(line, computations.get(condition, ()))
      if known is None and depth < len(trips):
        return [_repeated(cost(body, depth + 1), trips[depth])]
      return [_repeated(cost(body, depth + (known is None)), known)]
    if operation == "conditional":
      listed = _BRANCHES.search(line)
      names = re.findall(r"[^\s,%]+", listed[1]) if listed else _BRANCH.findall(line)
      branches = [cost(name, depth) for name in names]
      return [max(branches, key=lambda branch: (branch.cycles, branch.moved))]
    return [cost(called, depth) for called in _CALL.findall(line)]

  return cost(entry)


def _split(text):
  """-> {name of a computation: its lines}, the name of the first to run."""
  computations, entry, lines = {}, None, []
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      lines = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    else:
      lines.append(line)
  return computations, entry


def _trips(line, condition):
  """How often a loop runs, or None."""
  if known := _TRIPS.search(line):
    return int(known[1])
  root = next((line for line in condition if line.lstrip().startswith("ROOT")), "")
  bound = _COUNTS_UP.search(root)
  if bound is None:
    return None
  constant = re.compile(rf"^ +%?{re.escape(bound[1])} = \S+ constant\((\d+)\)")
  return next((int(found[1]) for found in map(constant.match, condition) if found), None)


def _repeated(body, trips):
  times = 1 if trips is None else trips
  return Cost(
    body.cycles * times,
    {
      key: one._replace(times=one.times * times, looped=one.looped or trips != 1)
      for key, one in body.collectives.items()
    },
    body.open_loops + (trips is None),
  )


def _result_bytes(shape, kind, start):
  arrays = []
  for letters, bits, dimensions in _ARRAY.findall(shape):
    size = int(bits) if bits else 8 if letters == "pred" else 0
    for length in filter(None, dimensions.split(",")):
      size *= int(length)
    arrays.append((size // 8, bool(dimensions)))
  if start and kind != "all-reduce":
    # What begins here and ends later lists its operands, then its results, then scalars to wait on.
    listed = [size for size, has_axes in arrays if has_axes]
    return sum(listed[len(listed) // 2 :])
  return sum(size for size, _ in arrays)
