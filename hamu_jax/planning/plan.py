"""Memory, time and collectives of a step of an experiment, without its devices.

  python -m hamu_jax.plan --config=configs/tofu_llama2_hamu.py --topology=v5e:2x4
  python -m hamu_jax.plan --config=configs/cifar_hamu.py --topology=v5e:4x4 --config.pairing=pmap

compiles it, without weights, data or a network, and prints its memory, its exchanges between devices and
how long it takes. `--stage=pretrain` takes a step of training instead of one of unlearning; `--compare` sets
it against the gradients of its losses alone; `--example-tokens=N` says how long texts are on average;
`--config.FIELD` is as in `hamu_jax.main`. For images, the sizes of some named datasets are known.

`libtpu` (extra `tpu`) compiles for TPUs on machines without one, so the figures are those of the
program that would run. Without it, or with `--simulate`, the step is compiled for as many simulated CPU
devices: their programs differ, above all in memory, and the figures are an estimate.

Exit status: 0 if the step fits the devices, 1 if it does not, 2 for bad input.
"""

import argparse
import importlib.util
import math
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from hamu_jax.config import command_line as config_command_line
from hamu_jax.config import modalities, readers, validation
from hamu_jax.config.kinds import choice, in_range
from hamu_jax.errors import UserError
from hamu_jax.models import llama_config, pretrained
from hamu_jax.planning import abstract_stage, hlo
from hamu_jax.planning import language as language_plan
from hamu_jax.planning import vision as vision_plan
from hamu_jax.run import command_line
from hamu_jax.run.tables import format_table

_DOES_NOT_FIT = 1


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


# Memory, and the bandwidth of a chip's links over their number: docs.cloud.google.com/tpu/docs/v5e and the
# pages beside it; the rate of v4 is an estimate. Clocks: the peak rate there over the operations that
# the compiler reckons with in a cycle, 2^18 a chip, but 2^17 of v5e and 2^19 of v6e.
CHIPS = {
  "v4": Chip(32 * 2**30, 1.05e9, 1e11),
  "v5e": Chip(16 * 2**30, 1.5e9, 1e11),
  "v5p": Chip(95 * 2**30, 1.75e9, 2e11),
  "v6e": Chip(32 * 2**30, 1.75e9, 2e11),
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
    cost: what it does; None if its text cannot be read.
  """

  arguments: int
  outputs: int
  temporaries: int
  code: int
  cost: hlo.Cost | None

  @property
  def hbm(self) -> int:
    """Bytes of memory in use at the most."""
    return self.arguments + self.outputs + self.temporaries + self.code


class DoesNotFit(UserError):
  """The devices have too little memory for any program that the compiler finds."""


def find_target(topology: str, simulate: bool = False) -> Target:
  """The devices of a TPU topology, to compile for.

  Call it before JAX has started, so that it can simulate as many devices where `libtpu` is missing.

  Args:
    topology: generation and shape, such as "v5e:2x4".
    simulate: whether to do so where `libtpu` is, too.

  Raises:
    UserError: no such topology, or it cannot be had.
  """
  match = _TOPOLOGY.fullmatch(topology)
  if match is None or not math.prod(map(int, match[2].split("x"))):
    raise UserError(
      f"--topology={topology}: give a generation ({', '.join(CHIPS)}) and its shape in chips, such as v5e:2x4"
    )
  chip, chips = CHIPS[match[1]], math.prod(map(int, match[2].split("x")))
  simulated = simulate or importlib.util.find_spec("libtpu") is None
  devices = _simulated_devices(topology, chips) if simulated else _tpu_devices(topology)
  # Where a chip has two devices, each has half of its memory.
  return Target(topology, tuple(devices), chip, chip.hbm * chips // len(devices), simulated)


def _tpu_devices(topology):
  # The machine is none of Google's: looking for its metadata takes minutes, and fails.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
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
      " 'hamu-jax[tpu]' to compile for real ones"
    )
  return devices[:count]


def analyse(lowered: jax.stages.Lowered, target: Target, trips: tuple[int, ...] = ()) -> Plan:
  """Compiles a program and reads what it takes.

  Args:
    lowered: for the target's devices.
    target: names them in errors.
    trips: see `hlo.read`.

  Raises:
    DoesNotFit: the compiler finds no way to run it in the devices' memory.
  """
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    reason = re.search(r"Ran out of memory.*?(?=\. |$)", str(error), re.MULTILINE)
    if "RESOURCE_EXHAUSTED" not in str(error) or reason is None:
      raise
    raise DoesNotFit(
      f"--topology={target.name}: the step does not fit: {reason[0]}; take more devices, a smaller"
      " batch or microbatch or, of a language model, rematerialization 'full'"
    ) from None
  try:
    text = compiled.as_text()
    assert text is not None  # What has been compiled for a topology has one.
    cost = hlo.read(text, trips)
  except jax.errors.JaxRuntimeError:
    # A newer libtpu has instructions that this jaxlib does not know.
    cost = None
  memory = compiled.memory_analysis()
  assert memory is not None  # As above.
  return Plan(
    memory.argument_size_in_bytes,
    memory.output_size_in_bytes - memory.alias_size_in_bytes,
    memory.temp_size_in_bytes,
    memory.generated_code_size_in_bytes,
    cost,
  )


def fits(plan: Plan, target: Target) -> bool:
  """Whether a device has the memory."""
  return plan.hbm < target.hbm


def computing(plan: Plan, target: Target) -> float:
  """Seconds that the compiler estimates; 0 where it does not. Needs the plan's cost."""
  assert plan.cost is not None
  return plan.cost.cycles / target.chip.clock


def exchanging(plan: Plan, target: Target) -> float:
  """Seconds of all collectives, if each runs in a ring at the rate of its links. Needs the plan's cost."""
  assert plan.cost is not None
  return plan.cost.moved / target.chip.ring


def describe(plan: Plan, target: Target) -> str:
  """The plan as text for people."""
  share = plan.hbm / target.hbm
  rows = [
    ("arguments", _size(plan.arguments)),
    ("outputs in new places", _size(plan.outputs)),
    ("temporaries", _size(plan.temporaries)),
    ("program", _size(plan.code)),
    ("memory of a device", f"{_size(plan.hbm)} of {_size(target.hbm)}, {share:.0%}"),
    ("fits", "yes" if fits(plan, target) else "no"),
  ]
  if plan.cost is None:
    rows.append(("time", "not known: jaxlib cannot read this libtpu's program; pip install 'jax[tpu]'"))
  elif plan.cost.cycles:
    seconds = computing(plan, target)
    rows.append(("computing", f"{seconds:.3g} s a step, the compiler's estimate"))
  if plan.cost and plan.cost.collectives:
    seconds = exchanging(plan, target)
    rows.append(("exchanging", f"{seconds:.3g} s a step at the links' rate, partly at the same time"))
    rows += _exchanges(plan.cost)
  what = "an estimate, from simulated CPU devices" if target.simulated else "as compiled by libtpu"
  count = len(target.devices)
  return f"{count} device{'s' if count > 1 else ''} of {target.name}, {what}\n{format_table((), rows)}"


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


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, config_command_line.CommandLine]:
  """-> this program's own options, the command line of the experiment."""
  parser = command_line.Parser(add_help=False)
  parser.add_argument("--topology")
  parser.add_argument("--stage", default="unlearn")
  parser.add_argument("--example-tokens", type=int, default=100)
  parser.add_argument("--compare", action="store_true")
  parser.add_argument("--simulate", action="store_true")
  options, rest = parser.parse_known_args(arguments[1:])
  if options.topology is None:
    raise UserError("--topology is missing; for example --topology=v5e:2x4")
  choice("--stage", options.stage, abstract_stage.STAGES)
  in_range("--example-tokens", options.example_tokens, 4)
  return options, config_command_line.parse([arguments[0], *rest])


def _sizes(config) -> tuple[str, llama_config.LlamaConfig]:
  """-> where they are from, the sizes of a configuration's model."""
  path, preset = config.language.path, config.language.preset
  if path == pretrained.INVENTED:
    return path, llama_config.read_config(pretrained.INVENTED_FOLDER)
  if path and pathlib.Path(path).is_dir():
    return path, llama_config.read_config(path)
  choice("config.language.preset", preset, tuple(llama_config.PRESETS))
  if path and preset == "tiny":
    raise UserError(
      f"config.language.path={path!r}: no local folder, and no hub is asked; set config.language.preset to "
      f"what it is: {', '.join(llama_config.PRESETS)}"
    )
  return preset, llama_config.PRESETS[preset]


def _check(config, given) -> None:
  if config.data.forget == "memorization":
    # Which examples are the most memorized makes no difference to a program, and no file needs to be there.
    config.data.scores = readers.ESTIMATE
  validation.validate_values(config, given)
  if modalities.is_language(config) and config.language.attention != "xla":
    raise UserError(f"config.language.attention={config.language.attention!r}: is for GPUs; set it to 'xla'")


def _abstract_stage(config, options, target: Target) -> tuple[abstract_stage.AbstractStage, str]:
  """-> what is compiled, the name of its model."""
  if not modalities.is_language(config):
    return vision_plan.AbstractStage(config, target.devices, options.stage), config.model.name
  model, sizes = _sizes(config)
  stage = language_plan.AbstractStage(config, sizes, target.devices, options.example_tokens, options.stage)
  return stage, f"{model}, {config.language.param_dtype}"


def _facts(stage: abstract_stage.AbstractStage, model: str) -> str:
  """What is compiled, and what is assumed of it."""
  frozen, trained = stage.parameters
  parameters = f"{frozen:,} parameters, {trained:,} trained" if frozen else f"{trained:,} parameters"
  return format_table((), [("model", f"{model}: {parameters}"), *stage.facts()])


def _comparison(step: Plan, plain: Plan, roles: int, target: Target) -> str:
  """The step against the gradients alone."""
  timed = step.cost is not None and plain.cost is not None

  def figures(plan):
    if not timed:
      return (plan.hbm,)
    seconds = computing(plan, target), exchanging(plan, target)
    return plan.hbm, *seconds, sum(seconds)

  def row(name, values):
    memory, *seconds = values
    return name, _size(memory), *(f"{value:.4g}" for value in seconds)

  both = figures(step), figures(plain)
  ratios = (f"{one / other:.3f}" if other else "-" for one, other in zip(*both, strict=True))
  header = ("program", "memory", "computing s", "exchanging s", "one after the other s")
  return format_table(
    header if timed else header[:2],
    [
      row("step", both[0]),
      row(f"{roles} plain gradient{'s' if roles > 1 else ''}", both[1]),
      ("ratio", *ratios),
    ],
  )


def _run(arguments: Sequence[str]) -> int:
  # Nothing is run, and starting an accelerator may take long or be refused.
  jax.config.update("jax_platforms", "cpu")
  options, values = _parse(arguments)
  config = values.config
  _check(config, values.given)
  target = find_target(options.topology, options.simulate)
  if options.compare and target.simulated:
    raise UserError(
      "--compare: there are no estimates of time for simulated devices; pip install 'hamu-jax[tpu]'"
    )
  stage, model = _abstract_stage(config, options, target)
  target = target._replace(devices=stage.devices)
  print(_facts(stage, model), end="\n\n", flush=True)
  plan = analyse(stage.step(), target, stage.trips)
  print(describe(plan, target), flush=True)
  if options.compare:
    plain = analyse(stage.plain(), target, stage.trips)
    print("", _comparison(plan, plain, len(stage.stage.method.roles), target), sep="\n")
  return 0 if fits(plan, target) else _DOES_NOT_FIT


def run(arguments: Sequence[str]) -> int:
  """Parses a command line and plans.

  Args:
    arguments: as `sys.argv`, the program's name first.

  Returns:
    The exit status.
  """

  def program():
    try:
      return _run(arguments)
    except DoesNotFit as error:
      print(f"error: {error}", file=sys.stderr)
      return _DOES_NOT_FIT

  return command_line.run(program, arguments, lambda: __doc__)
