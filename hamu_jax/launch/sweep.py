"""Runs all experiments of a sweep.

  python -m hamu_jax.launch.sweep --config=hamu_jax:sweeps/cifar_constraint --workdir=runs/constraint

runs the members that are not done, each in a run directory inside the workdir. After an interruption, run the
same command to resume. Members share equal stages, such as pretraining, in WORKDIR/stages.
`hamu_jax.launch.expand` explains sweep files. In a clone of the repository, `python -m launch.sweep` is the
same program.

  --config=FILE[:VARIANT]   the sweep; hamu_jax:sweeps/NAME[:VARIANT] is a sweep of the package
  --workdir=DIR             folder of the sweep (default: runs/ and the name of the sweep)
  --jobs=N                  number of members that run at a time and share the GPUs (default 1); under SLURM,
                            number of tasks at a time (default: as many as the cluster allows)
  --filter=REGEX            only members with a match in their name, as in '^hamu-q,.*seed=41$'
  --engine=ENGINE           local (default) runs them here; vmap does, too, but runs members that differ only
                            in hyperparameters and seeds in one process and one program; slurm submits one
                            job array; print shows the commands of those that are not done
  --together=N              for vmap: largest number of members of one program (default: no limit)
  --sbatch='OPTIONS'        options of sbatch, such as '--partition=gpu --gpus=1 --time=4:00:00'
  --config.FIELD=VALUE      value of a field, for all members
"""

import argparse
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

from hamu_jax.run import preemption

if __name__ == "__main__":
  # The other imports take seconds.
  preemption.leave_on_signals()

from hamu_jax.config import files, paths
from hamu_jax.config.kinds import LARGEST_INT, Text, choice, in_range
from hamu_jax.errors import UserError
from hamu_jax.launch import expand, local, slurm
from hamu_jax.run import command_line

ENGINES = ("local", "vmap", "slurm", "print")
_FAILED = 1


class _Parser(command_line.Parser):
  """A parser whose errors refer to --help."""

  def error(self, message):
    super().error(f"{message}; see python -m hamu_jax.launch.sweep --help")


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Parses the options and the overrides of all members."""
  parser = _Parser(prog="hamu_jax.launch.sweep", add_help=False)
  parser.add_argument("--config", required=True)
  parser.add_argument("--workdir")
  parser.add_argument("--jobs", type=int)
  parser.add_argument("--filter", default="")
  parser.add_argument("--engine", default="local")
  parser.add_argument("--together", type=int)
  parser.add_argument("--sbatch", default="")
  options, overrides = parser.parse_known_args(arguments)
  for override in overrides:
    if not re.match(r"--config\.[^=]+=", override):
      raise UserError(f"{override!r}: not understood; fields are given as --config.FIELD=VALUE")
  choice("--engine", options.engine, ENGINES)
  in_range("--jobs", options.jobs, 1, LARGEST_INT)
  in_range("--together", options.together, 1)
  if options.together is not None and options.engine != "vmap":
    raise UserError(
      f"--together={options.together}: only --engine=vmap trains members together; leave it out or set that"
    )
  try:
    shlex.split(options.sbatch)
  except ValueError as error:
    raise UserError(f"--sbatch={options.sbatch}: its quotes are not balanced; close each of them") from error
  # Its name is that of a job, in a comment of a script that a line break would end.
  Text().check("--config", options.config)
  paths.check_workdir(options.workdir or "")
  if options.workdir == "":
    raise UserError("--workdir=: is empty; give a folder, or leave the option out")
  options.workdir = options.workdir or f"runs/{_name(options.config)}"
  return options, overrides


def _name(config: str) -> str:
  """The name of a sweep's file."""
  return pathlib.Path(files.find(config).partition(":")[0]).stem


def _choose(members: Sequence[expand.Member], pattern: str) -> list[expand.Member]:
  """The members whose names match."""
  try:
    chosen = [member for member in members if re.search(pattern, member.name)]
  except re.error as error:
    raise UserError(
      f"--filter={pattern}: not a regular expression ({error}); escape special characters with \\"
    ) from error
  if not chosen:
    raise UserError(
      f"--filter={pattern}: matches none of the {len(members)} members, one of which is {members[0].name}"
    )
  return chosen


def _print_commands(left: Sequence[expand.Member], workdir: pathlib.Path) -> None:
  for member in left:
    print(shlex.join(local.command([member], workdir)))


def _submit(options, overrides: Sequence[str], left: Sequence[expand.Member], workdir) -> None:
  script = workdir / "slurm" / "array.sbatch"
  slurm.write_script(
    script,
    left,
    name=_name(options.config),
    jobs=options.jobs or 0,
    arguments=[f"--config={options.config}", f"--workdir={workdir}", *overrides],
  )
  print(f"{slurm.submit(script, shlex.split(options.sbatch))}: {len(left)} members, one a task; {script}")


def _run_here(options, members, chosen, workdir) -> int:
  groups: list[tuple[expand.Member, ...]] = [(member,) for member in chosen]
  if options.engine == "vmap":
    groups = local.group(chosen, options.together or len(chosen))
  # The members end before the sweep.
  with preemption.Watch(longest_seconds=local.GRACE_SECONDS + 5) as watch:
    failures = local.Runner(members, workdir, options.jobs or 1, watch).run(groups)
  for failure in failures:
    print(f"failed: {failure.name}: {failure.reason}", file=sys.stderr)
  print(f"{len(chosen) - len(failures)} of {len(chosen)} members are done; everything is in {workdir}")
  return _FAILED if failures else 0


def _sweep(arguments: Sequence[str]) -> int:
  options, overrides = _parse(arguments)
  workdir = pathlib.Path(options.workdir)
  members = expand.expand(options.config, overrides, stage_cache=str(workdir / "stages"))
  chosen = _choose(members, options.filter)
  # This also refuses run directories of other experiments before anything runs.
  left = [member for member in chosen if not local.is_done(member, workdir)]
  if options.engine in ("local", "vmap"):
    return _run_here(options, members, chosen, workdir)
  if options.engine == "print":
    _print_commands(left, workdir)
  elif left:
    _submit(options, overrides, left, workdir)
  else:
    print(f"all {len(chosen)} members are done; everything is in {workdir}")
  return 0


def run(arguments: Sequence[str]) -> int:
  """Parses a command line and runs the sweep.

  Args:
    arguments: command line in the form of `sys.argv`, the program's name first.

  Returns:
    The exit status: 0, 1 if members failed, 2 for bad input. An interruption ends the process with 143.
  """

  def program():
    try:
      return _sweep(arguments[1:])
    except BrokenPipeError:
      # The reader of the commands, such as head, has closed the pipe.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 0

  return command_line.run(program, arguments, lambda: __doc__)


if __name__ == "__main__":
  sys.exit(run(sys.argv))
