"""Runs one experiment.

  python -m hamu_jax.main --config=configs/cifar_hamu.py --workdir=runs/cifar

Any field of the configuration can be overridden, for example by `--config.method.constraint_ratio=0.9`.
`--dry-run` checks the configuration, loads data and model, says what the run would compute, and ends.
"""

import importlib
import sys
from collections.abc import Sequence

from hamu_jax.run import preemption, progress

if __name__ == "__main__":
  # The other imports take seconds.
  preemption.leave_on_signals()
  with progress.starting(sys.argv):
    importlib.import_module("hamu_jax.experiment.experiment")

from hamu_jax.config import command_line as config_command_line
from hamu_jax.config import validation
from hamu_jax.config.help import help_text
from hamu_jax.experiment import experiment
from hamu_jax.run import command_line, hosts


def _run(arguments: Sequence[str]) -> None:
  parser = command_line.Parser(add_help=False)
  parser.add_argument("--dry-run", action="store_true")
  options, rest = parser.parse_known_args(arguments[1:])
  values = config_command_line.parse([arguments[0], *rest])
  validation.validate(values.config, values.given)
  hosts.initialize(values.config.distributed)
  workdir = config_command_line.workdir_of(values)
  with preemption.Watch() as watch:
    if options.dry_run:
      text = experiment.dry_run(values.config, workdir, watch)
      if hosts.is_writer():
        print(f"{text}\ndry run: nothing was trained or written; without --dry-run it would go to {workdir}")
    else:
      experiment.Experiment(values.config, workdir, watch).run()


def run(arguments: Sequence[str]) -> int:
  """Parses a command line and runs it.

  Args:
    arguments: as `sys.argv`, the program's name first.

  Returns:
    The exit status: 0, or 2 for bad input. A run that was interrupted ends the process with 143.
  """
  return command_line.run(lambda: _run(arguments), arguments, lambda: f"{__doc__}\n{help_text()}")


if __name__ == "__main__":
  sys.exit(run(sys.argv))
