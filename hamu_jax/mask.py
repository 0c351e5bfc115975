"""Computes the saliency mask of an experiment, and nothing after it.

  python -m hamu_jax.mask --config=configs/digits_sharp.py:sharp_minmax,high --workdir=runs/mask

runs the stages before unlearning, or takes them from the cache, and leaves `mask.safetensors` in the run
directory, which `--config.mask.path` of other runs reads. `hamu_jax.main` with the same arguments goes on
from there.
"""

import sys
from collections.abc import Sequence

from hamu_jax.run import preemption

if __name__ == "__main__":
  # The other imports take seconds.
  preemption.leave_on_signals()

from hamu_jax.config import command_line as config_command_line
from hamu_jax.config import readers, validation
from hamu_jax.errors import UserError
from hamu_jax.experiment import experiment
from hamu_jax.run import command_line, hosts


def _run(arguments: Sequence[str]) -> None:
  values = config_command_line.parse(arguments)
  config = values.config
  validation.validate(config, values.given)
  if config.mask.path:
    raise UserError(f"config.mask.path={config.mask.path!r}: the mask is there already; leave the path out")
  if not readers.UNLEARNS.holds(config) or not config.mask.fraction:
    raise UserError(
      f"config.mask.fraction={config.mask.fraction}: config.method.name={config.method.name!r} has no mask "
      "here; choose a fraction, and a method that unlearns images"
    )
  hosts.initialize(config.distributed)
  workdir = config_command_line.workdir_of(values)
  with preemption.Watch() as watch:
    masks = experiment.Experiment(config, workdir, watch).make_mask()["masks"]
  if hosts.is_writer():
    for each in masks:
      share = f"{each['gradient_share']:.1%} of the gradient"
      print(f"fraction {each['fraction']:g}: {each['weights']:,} weights, {share}")
    print(f"the mask of fraction {config.mask.fraction:g} is {workdir / 'mask.safetensors'}")


def run(arguments: Sequence[str]) -> int:
  """Parses a command line and computes the mask.

  Args:
    arguments: as `sys.argv`, the program's name first.

  Returns:
    The exit status: 0, or 2 for bad input. A run that was interrupted ends the process with 143.
  """
  return command_line.run(lambda: _run(arguments), arguments, lambda: __doc__)


if __name__ == "__main__":
  sys.exit(run(sys.argv))
