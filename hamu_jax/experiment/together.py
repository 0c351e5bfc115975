"""Trains experiments together that differ only in hyperparameters and seeds.

  python -m hamu_jax.together --config=FILE --workdir=A --config.method.constraint_ratio=0.1 -- \\
      --config=FILE --workdir=B --config.method.constraint_ratio=0.2

takes the arguments of several runs of `hamu_jax.main`, separated by `--`; `launch.sweep --engine=vmap` writes
such commands. The models of a stage that are not in the stage cache are trained by one program on one device,
mapped over their weights, indices and hyperparameters. Each experiment then goes on alone. Its run directory
is the same as that of `hamu_jax.main`, with the same numbers up to rounding.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

import ml_collections

from hamu_jax.config import command_line as config_command_line
from hamu_jax.config import default as config_lib
from hamu_jax.config import modalities, readers, validation
from hamu_jax.config.hyperparameters import traced_fields
from hamu_jax.errors import UserError
from hamu_jax.experiment import experiment
from hamu_jax.run import command_line, preemption, rundir
from hamu_jax.run import stage_cache as stages

_SEEDS = frozenset({"seed", "method.seed", "evaluate.seed"})


def group_key(config: ml_collections.ConfigDict) -> str | None:
  """A key that experiments have in common if they can be trained together; None if that is impossible.

  Such experiments may differ in values that their steps read as data (learning rates, constraint, radius, rho
  and the coefficients of methods, unless a value switches something off). Experiments on images whose forget
  set does not depend on seeds may also differ in seeds. `pmap` uses its devices for one model, and Weights &
  Biases uses a process for one run, so neither can be used together.

  Args:
    config: validated configuration.
  """
  if config.pairing == "pmap" or config.distributed.coordinator or config.wandb.project:
    return None
  fixed = {}
  traced = traced_fields()
  is_images = modalities.name_of(config) == modalities.IMAGES
  own_seeds = is_images and config.data.scores != readers.ESTIMATE
  for name, value in rundir.fields(rundir.jsonable(config.to_dict())):
    if config_lib.is_incidental(name) or (name in _SEEDS and own_seeds):
      continue
    if name in traced:
      value = bool(value) if traced[name] else value is not None
    fixed[name] = value
  return stages.fingerprint(fixed)


def train(experiments: Sequence[experiment.Experiment]) -> dict[int, UserError]:
  """Trains all models that the stage cache lacks, stage by stage, and adds them to it.

  Args:
    experiments: experiments with one `group_key`; all but the first are built `like` the first.

  Returns:
    The errors of experiments that cannot go on, by number.

  Raises:
    preemption.Preempted: the run was asked to end; finished work is saved.
  """
  failures: dict[int, UserError] = {}
  lead = experiments[0]
  for each in experiments:
    each.stages.prepare()
  for name in ("pretrain", "retrain", "unlearn"):
    lacking: dict[str, list[int]] = {}
    for number, each in enumerate(experiments):
      if number not in failures and name in each.stages.keys() and each.stages.lacks(name):
        # Several experiments may have the same stage.
        lacking.setdefault(each.stages.keys()[name], []).append(number)
    if not lacking:
      continue
    trained = [experiments[numbers[0]] for numbers in lacking.values()]
    # A single stage resumes from the checkpoints of its own experiment.
    key = next(iter(lacking)) if len(lacking) == 1 else stages.fingerprint({"together": list(lacking)})
    owner = trained[0] if len(lacking) == 1 else lead
    outcomes = lead.stages.loop.run(
      [each.stages.member(name) for each in trained], owner.stages.checkpoints(f"{name}-{key}")
    )
    for each, numbers, outcome in zip(trained, lacking.values(), outcomes, strict=True):
      try:
        each.stages.publish(name, outcome, together=len(trained))
      except UserError as error:
        failures |= dict.fromkeys(numbers, error)
  return failures


def run_members(
  members: Sequence[tuple[ml_collections.ConfigDict, pathlib.Path]], watch: preemption.Watch
) -> dict[int, UserError]:
  """Runs experiments together, each to its end.

  Args:
    members: validated configurations with one `group_key`, and their run directories.
    watch: watcher of signals.

  Returns:
    See `train`.

  Raises:
    UserError: see `experiment.Experiment`.
    preemption.Preempted: see `train`.
  """
  with contextlib.ExitStack() as stack:
    experiments: list[experiment.Experiment] = []
    for config, workdir in members:
      like = experiments[0] if experiments else None
      experiments.append(experiment.Experiment(config, workdir, watch, like=like))
      stack.callback(experiments[-1].close)
    failures = train(experiments)
    for number, each in enumerate(experiments):
      if number not in failures:
        each.run()
  return failures


def _run(arguments: Sequence[str]) -> None:
  members = [config_command_line.parse([arguments[0], *part]) for part in _parts(arguments[1:])]
  for values in members:
    validation.validate(values.config, values.given)
    if not values.workdir:
      raise UserError("--workdir is missing: each experiment needs a run directory of its own")
  workdirs = [str(values.workdir) for values in members]
  for workdir in workdirs:
    if workdirs.count(workdir) > 1:
      raise UserError(f"--workdir={workdir}: two experiments have it; each needs a run directory of its own")
  keys = [group_key(values.config) for values in members]
  for workdir, key in zip(workdirs, keys, strict=True):
    if key is None or key != keys[0]:
      raise UserError(
        f"--workdir={workdir}: its configuration differs from that of {workdirs[0]} in more than "
        "hyperparameters and seeds, or uses pmap, several processes or wandb; run it by hamu_jax.main"
      )
  with preemption.Watch() as watch:
    failures = run_members(
      [(values.config, pathlib.Path(workdir)) for values, workdir in zip(members, workdirs)], watch
    )
  if failures:
    number, error = next(iter(failures.items()))
    others = f"; {len(failures) - 1} more failed" if len(failures) > 1 else ""
    raise UserError(f"{workdirs[number]}: {error}{others}")


def _parts(arguments: Sequence[str]) -> Iterator[list[str]]:
  """Yields the arguments of each experiment."""
  part: list[str] = []
  for argument in arguments:
    if argument == "--":
      yield part
      part = []
    else:
      part.append(argument)
  yield part


def run(arguments: Sequence[str]) -> int:
  """Parses a command line and runs its experiments.

  Args:
    arguments: as `sys.argv`, the program's name first.

  Returns:
    The exit status: 0, or 2 for bad input. A run that was interrupted ends the process with 143.
  """
  return command_line.run(lambda: _run(arguments), arguments, lambda: __doc__)
