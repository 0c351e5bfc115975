"""Expands a sweep file into its members, which are experiments. Nothing is run here.

A sweep file has a function `get_sweep(variant="")` that returns a block, or a list of blocks:

    {
        "config": "hamu_jax:cifar_hamu",
        "set": {"method.stop_on_criterion": True},
        "grid": {
            "method.name": ["hamu-q", "hamu-u"],
            "optimizer": {
                "sgd": {"method.optimizer.name": "sgd"},
                "momentum": {"method.optimizer.name": "sgd", "method.optimizer.momentum": 0.9},
            },
            "seed": [41, 42, 43],
        },
    }

`config` is the value of `--config` of `hamu_jax.main`. `set` holds fields that all members of the block
share. Each entry of `grid` is an axis: a field with a list of values, or a name with a dict of choices, each
with the fields that it sets. The members are all combinations. `words`, a list of lists, adds axes of words
after the colon of `config`, for configurations whose variants consist of words; "" leaves a word out. If a
field has no effect for some methods, put these methods into a block of their own without the field.
"""

import itertools
import pathlib
import re
import runpy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import flags

from hamu_jax.config import command_line as config_command_line
from hamu_jax.config import default as config_lib
from hamu_jax.config import files, readers, validation
from hamu_jax.engine import methods
from hamu_jax.errors import UserError
from hamu_jax.run import rundir
from hamu_jax.run.stage_cache import fingerprint

Block = Mapping[str, Any]
_KEYS = ("config", "words", "set", "grid")
# Fields of `config.data` that affect only the choice of the forget set.
_FORGET_FIELDS = (
  "forget",
  "forget_class",
  "hard_probability",
  "forget_fraction",
  "forget_indices",
  "scores",
  "memorization_level",
  "forget_size",
  "duplicates",
)


class Member(NamedTuple):
  """One experiment of a sweep.

  Attributes:
    name: name of its run directory in the sweep's, which lists its values on the sweep's axes.
    arguments: command-line arguments of `hamu_jax.main`, without the workdir.
    config: validated configuration that the arguments resolve to.
  """

  name: str
  arguments: tuple[str, ...]
  config: ml_collections.ConfigDict


class _Draft(NamedTuple):
  """A member before its configuration is resolved: fields by dotted name, and the parts of its name."""

  config: str
  fields: dict[str, Any]
  labels: tuple[str, ...]


def load_sweep(path: str) -> list[Block]:
  """Loads the blocks of a sweep file.

  Args:
    path: path of the file, optionally followed by `:variant`; or `hamu_jax:NAME[:VARIANT]`.

  Returns:
    The blocks.

  Raises:
    UserError: if the file does not exist, fails, or does not describe a sweep.
  """
  name, _, variant = files.find(path).partition(":")
  if not pathlib.Path(name).is_file():
    there = sorted(file.stem for file in pathlib.Path(name).parent.glob("*.py"))
    raise UserError(
      f"--config={path}: no such sweep; "
      + (
        f"in {pathlib.Path(name).parent} there are {', '.join(there)}"
        if there
        else "give a file with a get_sweep(), such as hamu_jax:sweeps/cifar_constraint"
      )
    )
  try:
    get_sweep = runpy.run_path(name).get("get_sweep")
    if get_sweep is None:
      raise UserError(
        f"--config={path}: has no get_sweep(); run a single experiment with python -m hamu_jax.main"
      )
    sweep = get_sweep(variant) if variant else get_sweep()
  except UserError:
    raise
  except Exception as error:  # A sweep file may raise anything.
    raise UserError(f"--config={path}: {_one_line(error)}") from error
  blocks = [sweep] if isinstance(sweep, Mapping) else sweep
  if not isinstance(blocks, Sequence) or isinstance(blocks, str) or not blocks:
    raise UserError(f"--config={path}: get_sweep() must return a block or a list of blocks, not {sweep!r}")
  for block in blocks:
    _check_block(path, block)
  return list(blocks)


def expand(path: str, overrides: Sequence[str] = (), *, stage_cache: str) -> list[Member]:
  """Expands a sweep into its members.

  Args:
    path: see `load_sweep`.
    overrides: arguments `--config.FIELD=VALUE` for all members; they override the fields of the blocks.
    stage_cache: folder of finished stages that members share, unless an override names another.

  Returns:
    The members, in the order of the blocks.

  Raises:
    UserError: see `load_sweep`; also for an unknown field, a value of the wrong type, an invalid
      configuration, or two equal members.
  """
  blocks = load_sweep(path)
  overridden = _fields_of(overrides)
  cache = []
  if not overridden.get("stage_cache"):
    overrides = [each for each in overrides if each != "--config.stage_cache="]
    cache = [f"--config.stage_cache={stage_cache}"]
  drafts = [draft for block in blocks for draft in _drafts(block, overridden)]
  members: list[Member] = []
  names: set[str] = set()
  configs: dict[str, str] = {}
  for draft in drafts:
    # The name becomes that of a folder, so other characters are replaced.
    name = re.sub(r"[^\w.,=+()-]", "_", ",".join(draft.labels)) or "only"
    if name in names:
      raise UserError(
        f"--config={path}: two members are called {name!r}; distinguish them by an axis of named choices"
      )
    names.add(name)
    arguments = (
      f"--config={draft.config}",
      *(
        f"--config.{field}={_text(value)}" for field, value in draft.fields.items() if field not in overridden
      ),
      *overrides,
      *cache,
    )
    # As `hamu_jax.main` resolves them.
    values = config_command_line.parse(["hamu_jax.launch.sweep", *arguments])
    try:
      validation.validate(values.config, values.given)
    except UserError as error:
      raise UserError(f"{name}: {error}") from error
    same = _fingerprint(values.config)
    if same in configs:
      raise UserError(
        f"--config={path}: members {configs[same]!r} and {name!r} are the same experiment; leave one out, "
        "or sweep a field that has an effect"
      )
    configs[same] = name
    members.append(Member(name, arguments, values.config))
  return members


def shared_stages(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns {name: key} of the stages that an experiment may share with others.

  Experiments with equal keys have equal stages. The keys depend on the configuration alone, so no data
  need to be loaded; those of `stage_plan` depend on the data, too.
  """
  data, sam = config.data.to_dict(), config.sam.to_dict()
  forget = {name: data.pop(name) for name in _FORGET_FIELDS}
  common = {
    "data": data,
    "text": config.text.to_dict(),
    "language": config.language.to_dict(),
    "model": config.model.to_dict(),
    "seed": config.seed,
  }
  training = common | {
    "train": config.train.to_dict(),
    "sam": sam["train_rho"]
    and [sam[name] for name in ("train_rho", "train_mode", "adaptive", "lamb", "scope")],
  }
  method = methods.METHODS[config.method.name]
  stages = {}
  if forget["forget"] == "memorization" and forget["scores"] == readers.ESTIMATE:
    ensemble = config.memorization.to_dict()
    del ensemble["parallel"]
    stages["memorization"] = common | {"ensemble": ensemble}
  if not config.model.weights:
    # The checkpoint is selected on the retain and forget sets, unless there are validation examples; see
    # `stage_plan.make_plan`.
    by_split = config.train.select == "best" and not config.data.validation_fraction
    stages["pretrain"] = training | {"forget": forget if by_split or forget["duplicates"] else None}
  if readers.retrains(config):
    stages["retrain"] = training | {"forget": forget}
  if config.mask.fraction and not config.mask.path and method.unlearns:
    mask = [config.mask[name] for name in ("batch_size", "select", "fractions")]
    stages["mask"] = training | {"forget": forget, "mask": mask}
  return {name: fingerprint({name: inputs}) for name, inputs in stages.items()}


def _check_block(path: str, block: Any) -> None:
  """Raises a UserError unless a block has the form in the module's docstring."""
  if not isinstance(block, Mapping) or not isinstance(block.get("config"), str):
    raise UserError(f"--config={path}: a block of a sweep is a dict with a 'config', not {block!r}")
  for key in block:
    if key not in _KEYS:
      raise UserError(f"--config={path}: {key!r} is not a key of a block; choose from {', '.join(_KEYS)}")
  for key in ("set", "grid"):
    if not isinstance(block.get(key, {}), Mapping):
      raise UserError(f"--config={path}: {key!r} of a block is a dict, not {block[key]!r}")
  words = block.get("words", ())
  if not _is_list(words) or not all(
    _is_list(axis) and all(isinstance(word, str) for word in axis) for axis in words
  ):
    raise UserError(f"--config={path}: 'words' of a block is a list of lists of words, not {words!r}")
  grid = block.get("grid", {})
  sets = [
    block.get("set", {}),
    *(each for axis in grid.values() if isinstance(axis, Mapping) for each in axis.values()),
  ]
  for name in (*grid, *(field for each in sets if isinstance(each, Mapping) for field in each)):
    if not isinstance(name, str):
      raise UserError(
        f"--config={path}: {name!r} is not the name of a field; give a text such as 'method.name'"
      )
  for axis, choices in grid.items():
    named = isinstance(choices, Mapping) and all(isinstance(set_, Mapping) for set_ in choices.values())
    listed = _is_list(choices)
    if not choices or not (named or listed):
      raise UserError(
        f"--config={path}: axis {axis!r} needs a list of values, or a dict of fields for each choice, not"
        f" {choices!r}"
      )


def _is_list(value: Any) -> bool:
  return isinstance(value, Sequence) and not isinstance(value, str)


def _drafts(block: Block, overridden: Mapping[str, str]) -> Iterator[_Draft]:
  """Yields the combinations of a block's axes."""
  fixed = dict(block.get("set", {}))
  axes: list[list[tuple[str, None, dict[str, Any]]]] = [
    [(word, None, {}) for word in words] for words in block.get("words", ())
  ]
  grid = block.get("grid", {})
  # A field is called by the last part of its name if that is unique.
  last = [axis.rpartition(".")[2] for axis in grid]
  for axis, choices in grid.items():
    short = axis.rpartition(".")[2]
    called = axis if last.count(short) > 1 else short
    if isinstance(choices, Mapping):
      axes.append([(f"{called}={choice}", None, dict(fields)) for choice, fields in choices.items()])
    else:
      label = "{}" if axis == "method.name" else f"{called}={{}}"
      axes.append([(label.format(_text(value)), None, {axis: value}) for value in choices])
    for field in {name for *_, fields in axes[-1] for name in fields} & overridden.keys():
      raise UserError(
        f"--config.{field}={overridden[field]}: the sweep varies {axis}; choose members with --filter"
      )
  words_count = len(block.get("words", ()))
  for combination in itertools.product(*axes):
    words = ",".join(word for word, *_ in combination[:words_count] if word)
    fields = fixed.copy()
    for *_, choice in combination:
      fields |= choice
    labels = tuple(label for label, *_ in combination if label)
    joint = "," if ":" in block["config"].removeprefix(files.PREFIX) else ":"
    config = f"{block['config']}{joint}{words}" if words else block["config"]
    yield _Draft(config, fields, labels)


def _fields_of(arguments: Sequence[str]) -> dict[str, str]:
  """Returns {field: value} of `--config.FIELD=VALUE` arguments."""
  return {
    name.lstrip("-").removeprefix("config."): value
    for name, _, value in (argument.partition("=") for argument in arguments)
  }


def _fingerprint(config: ml_collections.ConfigDict) -> str:
  """Fingerprint of all fields that change results."""
  fields = rundir.fields(rundir.jsonable(config.to_dict()))
  return fingerprint({name: value for name, value in fields if not config_lib.is_incidental(name)})


def _text(value: Any) -> str:
  """A value in the syntax of the command line."""
  return value if isinstance(value, str) else repr(value)


def _one_line(error: Exception) -> str:
  """The last line of an error, which follows any traceback in its text."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  text = lines[-1] if lines else ""
  known = isinstance(error, ValueError | OSError | flags.Error)
  return text if known and text else f"{type(error).__name__}: {text}"
