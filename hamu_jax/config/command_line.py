"""The command line of a program with a configuration: --config=FILE, --config.FIELD=VALUE, --workdir=DIR.

FILE is a path or, see `files`, the name of a configuration that the package brings along.
"""

import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from hamu_jax.config import default as config_lib
from hamu_jax.config import files
from hamu_jax.errors import UserError


def _first_unknown_field(arguments: Sequence[str]) -> UserError | None:
  """The error for the first `--config.x.y` that names no field."""
  known = config_lib.field_names(config_lib.default_config())
  for argument in arguments:
    name = argument.lstrip("-").split("=", 1)[0]
    is_section = any(field.startswith(f"{name}.") for field in known)
    is_field = argument.startswith("-") and name.startswith("config.") and not is_section
    if is_field and name not in known:
      return config_lib.unknown_field(name)
  return None


def _with_paths(arguments: Sequence[str]) -> list[str]:
  """The arguments, a configuration that the package brings along as its path."""
  found = list(arguments)
  for at, argument in enumerate(arguments):
    flag, equals, value = argument.partition("=")
    if flag not in ("--config", "-config"):
      continue
    if equals:
      found[at] = f"{flag}={files.find(value)}"
    elif at + 1 < len(found):
      found[at + 1] = files.find(found[at + 1])
  return found


def parse(arguments: Sequence[str]) -> flags.FlagValues:
  """`absl`'s parser, with every complaint as a `UserError`."""
  arguments = _with_paths(arguments)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", None, "Configuration file, or hamu_jax:NAME.", flag_values=values, sys_argv=arguments
  )
  flags.DEFINE_string(
    "workdir",
    None,
    "Run directory; default runs/ and the name of the configuration file.",
    flag_values=values,
  )
  try:
    rest = values(arguments)
    if len(rest) > 1:
      raise UserError(f"{rest[1]!r}: not understood; options are --config, --workdir, --config.FIELD")
    if values.config is None:
      raise UserError("--config is missing; for example --config=hamu_jax:digits_hamu")
    return values
  except UserError:
    raise
  except Exception as error:  # A configuration file may raise anything.
    unknown = _first_unknown_field(arguments[1:])
    if unknown is not None:
      raise unknown from error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise UserError("; ".join(lines[:1] + lines[-1:] if len(lines) > 1 else lines)) from error


def workdir_of(values: flags.FlagValues) -> pathlib.Path:
  """The run directory that a parsed command line means."""
  path = config_flags.get_config_filename(values["config"]).split(":")[0]
  return pathlib.Path(values.workdir or f"runs/{pathlib.Path(path).stem}")
