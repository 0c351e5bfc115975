"""Runs one experiment.

  python -m hamu_jax.main --config=configs/cifar_hamu.py --workdir=runs/cifar

Any field of the configuration is overridden as `--config.method.constraint_ratio=0.9`.
"""

import os
import pathlib
import sys

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from hamu_jax import config as config_lib
from hamu_jax import preemption
from hamu_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run directory; default runs/ and the name of the configuration file."
)
_BAD_INPUT = 2
_TERMINATED = 128 + 15


def _first_unknown_field(arguments) -> UserError | None:
  """The error for the first `--config.x.y` that names no field."""
  known = config_lib.field_names(config_lib.default_config())
  for argument in arguments:
    name = argument.lstrip("-").split("=", 1)[0]
    is_section = any(field.startswith(f"{name}.") for field in known)
    if argument.startswith("-") and name.startswith("config.") and not is_section:
      if name not in known and name.replace("config.no", "config.", 1) not in known:
        return config_lib.unknown_field(name)
  return None


def _parse_flags(arguments):
  """`absl`'s parser, with every complaint as a `UserError`."""
  try:
    rest = flags.FLAGS(arguments)
    if len(rest) > 1:
      raise UserError(f"{rest[1]!r}: not understood; options start with --, see --help")
    if _CONFIG.value is None:
      raise UserError("--config is missing; for example --config=configs/digits_hamu.py")
    return rest
  except UserError:
    raise
  except Exception as error:  # A configuration file may raise anything.
    unknown = _first_unknown_field(arguments[1:])
    if unknown is not None:
      raise unknown from error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise UserError("; ".join(lines[:1] + lines[-1:] if len(lines) > 1 else lines)) from error


def _run() -> None:
  config = _CONFIG.value
  config_lib.validate(config)
  from hamu_jax import experiment  # Late: importing it starts nothing, but --help need not wait.
  from hamu_jax import hosts

  hosts.initialize(config.distributed)
  path = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
  workdir = pathlib.Path(_WORKDIR.value or f"runs/{pathlib.Path(path).stem}")
  with preemption.Watch() as watch:
    experiment.Experiment(config, workdir, watch).run()


def run(arguments=None) -> int:
  """Parses the command line and runs it; returns the exit status."""
  logging.set_verbosity(logging.WARNING)
  try:
    _parse_flags(sys.argv if arguments is None else arguments)
    _run()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return _BAD_INPUT
  except preemption.Preempted:
    print("interrupted: progress is saved; run the same command to go on", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # A device program may still be running in a thread that cannot be ended.
    os._exit(_TERMINATED)
  return 0


if __name__ == "__main__":
  app.define_help_flags()
  sys.exit(run())
