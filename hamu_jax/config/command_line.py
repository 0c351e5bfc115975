"""The command line of a program with a configuration: --config=FILE, --config.FIELD=VALUE, --workdir=DIR.

FILE is a path, or the name of a configuration that the package ships, see `files`.
"""

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from hamu_jax.config import default as config_lib
from hamu_jax.config import files
from hamu_jax.config.fields import FIELDS
from hamu_jax.errors import UserError


class CommandLine(NamedTuple):
  """A parsed command line.

  Attributes:
    config: the configuration, not yet validated.
    workdir: value of `--workdir`, None without it.
    file: path of the configuration file.
    given: dotted names, without "config", of the fields that the command line sets.
  """

  config: ml_collections.ConfigDict
  workdir: str | None
  file: str
  given: frozenset[str]


def _given_fields(arguments: Sequence[str]) -> Iterator[str]:
  """Yields the dotted names, without "config", of `--config.x.y` arguments; such a field need not exist."""
  for argument in arguments:
    # A flag is switched off by `--noconfig.x.y`.
    if found := re.match(r"--?(?:no)?config\.([^=]+)", argument):
      yield found[1]


def _first_unknown_field(arguments: Sequence[str]) -> UserError | None:
  """The error for the first `--config.x.y` that names no field."""
  for name in _given_fields(arguments):
    is_section = any(field.startswith(f"{name}.") for field in FIELDS)
    if not is_section and name not in FIELDS:
      return config_lib.unknown_field(f"config.{name}")
  return None


def _with_paths(arguments: Sequence[str]) -> list[str]:
  """The arguments, with the name of a configuration that the package ships replaced by its path."""
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


def parse(arguments: Sequence[str]) -> CommandLine:
  """Parses a command line as `absl` does, and raises every complaint as a `UserError`.

  Args:
    arguments: as `sys.argv`, the program's name first.
  """
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
    file = config_flags.get_config_filename(values["config"]).split(":")[0]
    return CommandLine(values.config, values.workdir, file, frozenset(_given_fields(arguments[1:])))
  except UserError:
    raise
  except Exception as error:  # A configuration file may raise anything.
    unknown = _first_unknown_field(arguments[1:])
    if unknown is not None:
      raise unknown from error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise UserError("; ".join(lines[:1] + lines[-1:] if len(lines) > 1 else lines)) from error


def workdir_of(values: CommandLine) -> pathlib.Path:
  """The run directory: `--workdir`, or runs/ and the name of the configuration file without its ending."""
  return pathlib.Path(values.workdir or f"runs/{pathlib.Path(values.file).stem}")
