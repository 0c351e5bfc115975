"""The command line of a program with a configuration: --config=FILE, --config.FIELD=VALUE, --workdir=DIR.

FILE is a path, or the name of a configuration that the package ships, see `files`.
"""

import difflib
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from hamu_jax.config import default as config_lib
from hamu_jax.config import files, paths
from hamu_jax.config.fields import FIELDS
from hamu_jax.config.kinds import Number
from hamu_jax.config.readers import value_of
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
  """The arguments, `--config` in one piece and the name of a shipped configuration replaced by its path."""
  rest, found = iter(arguments), []
  for argument in rest:
    flag, equals, value = argument.partition("=")
    if flag in ("--config", "-config"):
      value = value if equals else next(rest, "")
      argument = f"--config={files.find(value)}" if value else argument
    found.append(argument)
  return found


def _refuse_unclear(arguments: Sequence[str]) -> None:
  """Raises a UserError for options that absl would take in silence."""
  for argument in arguments:
    if re.match("--?(undefok|flagfile)(=|$)", argument):
      raise UserError(f"{argument}: not understood; options are --config, --workdir, --config.FIELD")
  if "--workdir=" in arguments:
    raise UserError("--workdir=: is empty; give a folder, or leave the option out")
  flags_given = [
    found[1] for each in arguments if (found := re.match(r"--?(?:no(?=config\.))?([\w.]+)", each))
  ]
  for flag in flags_given:
    if flags_given.count(flag) > 1:
      raise UserError(f"--{flag}: is given twice; leave one out")


def _check_file(reference: str) -> None:
  """Raises a UserError, with the nearest names there are, unless the file of `--config` exists."""
  path = pathlib.Path(reference.partition(":")[0])
  if not reference or path.is_file():
    return
  beside = {each.name: str(each) for each in sorted(path.parent.glob("*.py"))} if path.parent.is_dir() else {}
  nearest = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.3)
  hint = ", ".join(beside[name] for name in nearest) or f"{files.PREFIX}digits_hamu"
  raise UserError(f"--config={reference}: no such file; the nearest are {hint}")


def _one_line(error: BaseException, reference: str) -> str:
  """What is wrong with a command line or with its configuration file, without Python's own words."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
  given = re.match(r"flag --config\.([\w.]+)=(.*?): ", lines[0], re.DOTALL)
  if given and given[1] in FIELDS:
    field = FIELDS[given[1]]
    words = f"config.{given[1]}={given[2]!r}: must be {field.kind.words}; give such a value"
    return str(field.refusal(words))
  # The last line follows the traceback of a configuration file.
  text = lines[-1]
  if re.search(r"takes 0 positional arguments but \d+ (was|were) given", text):
    file, _, variant = reference.partition(":")
    return f"--config={reference}: {file} has no variants; leave out :{variant}"
  if len(lines) > 1 or not isinstance(error, flags.Error):
    return f"--config={reference}: {re.sub(r'^[A-Z][A-Za-z]*(Error|Exception): ', '', text)}"
  return text


def _fractions(arguments: Sequence[str]) -> dict[str, tuple[str, float]]:
  """{argument: (field, value)} of fractions for numbers whose default is whole; absl would refuse them."""
  found = {}
  for each in arguments:
    given = re.fullmatch(r"--?config\.([\w.]+)=([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)", each)
    field = FIELDS.get(given[1]) if given else None
    if given and field and isinstance(field.kind, Number) and isinstance(field.default, int):
      if not float(given[2]).is_integer():
        found[each] = (field.name, float(given[2]))
  return found


def parse(arguments: Sequence[str]) -> CommandLine:
  """Parses a command line as `absl` does, and raises every complaint as a `UserError`.

  Args:
    arguments: as `sys.argv`, the program's name first.
  """
  arguments = _with_paths(arguments)
  _refuse_unclear(arguments[1:])
  reference = next((each.partition("=")[2] for each in arguments[1:] if re.match("--?config=", each)), "")
  _check_file(reference)
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
    fractions = _fractions(arguments)
    rest = values([each for each in arguments if each not in fractions])
    if len(rest) > 1:
      raise UserError(f"{rest[1]!r}: not understood; options are --config, --workdir, --config.FIELD")
    if values.config is None:
      raise UserError("--config is missing; for example --config=hamu_jax:digits_hamu")
    # Some errors of the file appear only when its configuration is used.
    values.config.keys()
    with values.config.ignore_type():
      for name, number in fractions.values():
        section, _, leaf = name.rpartition(".")
        value_of(values.config, section)[leaf] = number
    file = config_flags.get_config_filename(values["config"]).split(":")[0]
    paths.check_workdir(values.workdir or "")
    return CommandLine(values.config, values.workdir, file, frozenset(_given_fields(arguments[1:])))
  except UserError:
    raise
  except SystemExit as error:
    raise UserError(f"--config={reference}: the file calls sys.exit(); return a configuration") from error
  except Exception as error:  # A configuration file may raise anything.
    unknown = _first_unknown_field(arguments[1:])
    if unknown is not None:
      raise unknown from error
    raise UserError(_one_line(error, reference)) from error


def workdir_of(values: CommandLine) -> pathlib.Path:
  """The run directory: `--workdir`, or runs/ and the name of the configuration file without its ending."""
  return pathlib.Path(values.workdir or f"runs/{pathlib.Path(values.file).stem}")
