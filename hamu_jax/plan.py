"""What a step needs of its devices, before there are any.

`libtpu` (extra `tpu`) compiles for TPUs on machines without one, so the figures are those of the
program that would run. Without it the step is compiled for as many simulated CPU devices: their
programs differ, above all in memory, and the figures are an estimate.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from hamu_jax import hlo
from hamu_jax.errors import UserError


class Chip(NamedTuple):
  """A generation of TPUs.

  Attributes:
    hbm: bytes of a chip's memory.
    clock: cycles a second.
    ring: bytes a second that a ring of chips passes on, in both directions together.
  """

  hbm: int
  clock: float
  ring: float


# Sources: the system architecture pages of Google Cloud TPU; clocks follow from the peak rate and
# the size of the matrix units; links from "How to Scale Your Model" (jax-ml.github.io/scaling-book).
CHIPS = {
    "v4": Chip(32 * 2**30, 1.05e9, 9e10),
    "v5e": Chip(16 * 2**30, 1.5e9, 9e10),
    "v5p": Chip(95 * 2**30, 1.75e9, 1.8e11),
    "v6e": Chip(32 * 2**30, 1.75e9, 1.8e11),
}
_TOPOLOGY = re.compile(rf"({'|'.join(CHIPS)}):(\d+(?:x\d+){{1,2}})")


class Target(NamedTuple):
  """Devices to compile for.

  Attributes:
    name: the topology's.
    devices: real ones need not be there.
    chip: what they are.
    hbm: bytes of memory of each.
    simulated: whether they are CPU devices that stand for TPUs.
  """

  name: str
  devices: tuple[Any, ...]
  chip: Chip
  hbm: int
  simulated: bool


class Plan(NamedTuple):
  """What a program takes on each device.

  Attributes:
    arguments: bytes of its arguments.
    outputs: bytes of its outputs, but for those that take the place of arguments.
    temporaries: bytes of what it computes in between.
    code: bytes of the program itself.
    cost: what it does.
  """

  arguments: int
  outputs: int
  temporaries: int
  code: int
  cost: hlo.Cost

  @property
  def hbm(self) -> int:
    """Bytes of memory in use at the most."""
    return self.arguments + self.outputs + self.temporaries + self.code


def find_target(topology: str) -> Target:
  """The devices of a TPU topology, to compile for.

  Call it before JAX has started, so that it can simulate as many devices where `libtpu` is missing.

  Args:
    topology: generation and shape, such as "v5e:2x4".

  Raises:
    UserError: no such topology, or it cannot be had.
  """
  match = _TOPOLOGY.fullmatch(topology)
  if match is None:
    raise UserError(
        f"--topology={topology}: give a generation ({', '.join(CHIPS)}) and its shape in chips, such"
        " as v5e:2x4")
  chip, chips = CHIPS[match[1]], math.prod(map(int, match[2].split("x")))
  simulated = importlib.util.find_spec("libtpu") is None
  devices = _simulated_devices(topology, chips) if simulated else _tpu_devices(topology)
  # Where a chip has two devices, each has half of its memory.
  return Target(topology, tuple(devices), chip, chip.hbm * chips // len(devices), simulated)


def _tpu_devices(topology):
  # The machine is none of Google's; looking for its metadata takes minutes.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0]
    if "lockfile" in reason:
      reason += " Another process uses libtpu: wait for it, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1."
    raise UserError(f"--topology={topology}: {reason}") from None


def _simulated_devices(topology, count):
  try:
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:  # JAX has started already, perhaps with enough of them.
    pass
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise UserError(
        f"--topology={topology}: {count} devices cannot be simulated with {len(devices)}; pip install"
        " 'hamu-jax[tpu]' to compile for real ones")
  return devices[:count]


def analyse(lowered: jax.stages.Lowered, target: Target) -> Plan:
  """Compiles a program and reads what it takes.

  Args:
    lowered: for the target's devices.
    target: names them in errors.

  Raises:
    UserError: the compiler finds no way to run it in the devices' memory.
  """
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    reason = re.search(r"Ran out of memory.*?(?=\. |$)", str(error), re.MULTILINE)
    if "RESOURCE_EXHAUSTED" not in str(error) or reason is None:
      raise
    raise UserError(
        f"--topology={target.name}: the step does not fit: {reason[0]}; take more devices, a smaller"
        " microbatch or rematerialization 'full'") from None
  memory = compiled.memory_analysis()
  return Plan(
      memory.argument_size_in_bytes,
      memory.output_size_in_bytes - memory.alias_size_in_bytes,
      memory.temp_size_in_bytes,
      memory.generated_code_size_in_bytes,
      hlo.read(compiled.as_text()),
  )


def describe(plan: Plan, target: Target) -> str:
  """The plan as text for people."""
  share = plan.hbm / target.hbm
  seconds = plan.cost.cycles / target.chip.clock
  rows = [
      ("arguments", _size(plan.arguments)),
      ("outputs in new places", _size(plan.outputs)),
      ("temporaries", _size(plan.temporaries)),
      ("program", _size(plan.code)),
      ("memory of a device", f"{_size(plan.hbm)} of {_size(target.hbm)}, {share:.0%}"),
      ("fits", "yes" if share < 1 else "no"),
  ]
  if plan.cost.cycles:
    rows.append(("computing", f"{seconds:.3g} s a step, the compiler's estimate"))
  if plan.cost.collectives:
    links = plan.cost.moved / target.chip.ring
    rows.append(("exchanging", f"{links:.3g} s a step at the links' rate, partly at the same time"))
  rows += [(kind, text) for kind, text in _exchanges(plan.cost)]
  what = "an estimate, from simulated CPU devices" if target.simulated else "as compiled by libtpu"
  return f"{len(target.devices)} devices of {target.name}, {what}\n{format_table((), rows)}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Aligned columns, the first to the left and, below a header, the others to the right."""
  cells = [[str(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return "\n".join(
      "  ".join(
          cell.rjust(width) if column and header else cell.ljust(width)
          for column, (cell, width) in enumerate(zip(row, widths, strict=True))
      ).rstrip()
      for row in cells
  )


def _exchanges(cost):
  """A row for each kind of collective, in loops and out of them."""
  groups = {}
  for one in cost.collectives.values():
    count, size = groups.get((one.kind, one.looped), (0, 0))
    groups[one.kind, one.looped] = count + one.times, size + one.times * one.size
  for (kind, looped), (count, size) in sorted(groups.items()):
    yield kind, f"{count} a step{', in loops' if looped else ''}, {_size(size)}"


def _size(count):
  unit, name = (2**30, "GiB") if count >= 2**30 / 10 else (2**20, "MiB")
  return f"{count / unit:.3g} {name}"
