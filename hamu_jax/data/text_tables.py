"""Tables of texts: local parquet, JSON or JSON-lines files, or splits of the Hugging Face hub."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hamu_jax import outside
from hamu_jax.data.huggingface import Hub, read_parquet
from hamu_jax.data.shards import Files, by_split
from hamu_jax.errors import UserError, first_line

Table = dict[str, Sequence[Any]]  # {column: list or `pyarrow.ChunkedArray` of its values}
Tables = Callable[[str, str], Table]  # (split, config field that names it) -> the split's table

SUFFIXES = (".parquet", ".json", ".jsonl")


def length(table: Table) -> int:
  """Counts the rows of a table."""
  return len(next(iter(table.values()), ()))


def cells(column: Any, rows: np.ndarray) -> list:
  """Reads some rows of a column of a `Table`, as Python values."""
  if hasattr(column, "to_pylist"):
    return column.take(rows).to_pylist()
  return [column[row] for row in rows]


def chosen(splits: dict[str, Any], where: str, name: str, field: str) -> Any:
  """Looks up a split.

  Args:
    splits: all splits by name.
    where: description of the source, for the error message.
    name: name of the split.
    field: the config field that gives the name, for the error message.

  Returns:
    The split.

  Raises:
    UserError: if no split has that name.
  """
  if name not in splits:
    raise UserError(f"{field}: {where} has no split {name!r}; choose from {', '.join(splits)}")
  return splits[name]


# --- the hub ---


def hub_splits(name: str, subset: str) -> Tables:
  """Loads the splits of one configuration of a hub dataset.

  Args:
    name: the dataset's hub id.
    subset: the configuration; empty for the default or only one.

  Returns:
    A function that looks up one of the splits.

  Raises:
    UserError: for a missing dataset, configuration or network.
  """
  splits = _hub(name).splits(subset)
  where = f"config.data.name={name!r}"
  return lambda split, field: _columns(chosen(splits, where, split, field))


def hub_configurations(name: str) -> Tables:
  """Loads configurations of a hub dataset that have one split each.

  Args:
    name: the dataset's hub id.

  Returns:
    A function that loads one of the configurations. It raises `UnknownSubset` for an unknown name.

  Raises:
    UserError: for a missing dataset.
  """
  hub = _hub(name)
  known = {}

  def table(subset: str, field: str) -> Table:
    if subset not in known:
      splits = hub.splits(subset, field)
      if len(splits) > 1:
        raise UserError(
          f"{field}: the configuration {subset!r} of {name!r} has several splits"
          f" ({', '.join(splits)}), not one as TOFU's; config.data.source='question_answer' reads"
          " them, with the configuration in config.data.subset"
        )
      (known[subset],) = splits.values()
    return _columns(known[subset])

  return table


def _hub(name: str) -> Hub:
  return Hub(name, example="TOFU is 'locuslab/TOFU'", no_network=_no_network)


def _no_network(what: str, error: Exception) -> UserError:
  return UserError(
    f"cannot download {what} ({first_line(error)}): point config.data.path at a local copy of its"
    " files (parquet, JSON or JSON lines), or take the embedded texts with"
    " config.data.source='authors'"
  )


def _columns(dataset) -> Table:
  """Returns the columns of a `datasets.Dataset`, memory-mapped."""
  table = dataset.with_format("arrow")[:]
  return dict(zip(table.column_names, table.columns, strict=True))


# --- local files ---


def local_files(path: str, subset: str, nested: bool = False) -> tuple[Files, str]:
  """Finds the files of each split.

  Args:
    path: a file, whose split is "train", or a folder of files NAME.parquet, NAME.json, NAME.jsonl,
      or their shards NAME-00000-of-00002.parquet, ....
    subset: the subfolder with the files; empty for the folder itself, or its subfolder "data".
    nested: whether a subfolder NAME with train.SUFFIX, sharded or not, is the split NAME.

  Returns:
    The files, and a description of the folder for error messages.

  Raises:
    UserError: if there are none.
  """
  folder = pathlib.Path(path, subset)
  where = f"config.data.path='{folder}'"
  if folder.is_file():
    if folder.suffix not in SUFFIXES:
      raise UserError(f"{where} has an unknown type; give a file of type {', '.join(SUFFIXES)}")
    return {"train": (folder,)}, where
  if not folder.is_dir():
    chosen_subset = f", config.data.subset={subset!r}" if subset else ""
    raise UserError(f"config.data.path={path!r}{chosen_subset} does not exist; give a file or a folder")
  files = _by_split(folder)
  folders = sorted(child for child in folder.iterdir() if child.is_dir())
  if nested:
    shards = {child.name: _by_split(child).get("train") for child in folders}
    files = {name: found for name, found in shards.items() if found} | files
  elif not files and (folder / "data").is_dir():
    files = _by_split(folder / "data")
  if not files:
    names = ", ".join(child.name for child in folders)
    raise UserError(
      f"{where} holds no file named after a split ({', '.join(SUFFIXES)})"
      + (f"; config.data.subset chooses one of its folders: {names}" if names else "; give another folder")
    )
  return files, where


def _by_split(folder: pathlib.Path) -> Files:
  return by_split(file for file in folder.iterdir() if file.suffix in SUFFIXES)


def file_tables(files: Files, where: str) -> Tables:
  """Reads each split once, when it is first used.

  Args:
    files: the files of all splits.
    where: description of their folder, for error messages.

  Returns:
    A function that reads one of the splits. It raises `UserError` for an unknown split or corrupt files.
  """
  known = {}

  def table(name: str, field: str) -> Table:
    if name not in known:
      known[name] = _read(chosen(files, where, name, field))
    return known[name]

  return table


def _read(files: tuple[pathlib.Path, ...]) -> Table:
  """Reads one split from one or several files of one type."""
  import pyarrow as pa

  if len({file.suffix for file in files}) > 1:
    raise UserError(
      f"config.data.path: {' and '.join(map(str, files))} are files of one split: keep one type"
    )
  if files[0].suffix == ".parquet":
    try:
      table = read_parquet(list(files))
    except pa.ArrowException as error:
      raise UserError(
        f"config.data.path: '{files[0]}' and those beside it have different columns ({first_line(error)});"
        " keep the files of one dataset there"
      ) from None
    return dict(zip(table.column_names, table.columns, strict=True))
  rows = [row for file in files for row in _read_json(file)]
  keys = dict.fromkeys(key for row in rows for key in row)
  return {key: [row.get(key) for row in rows] for key in keys}


def _read_json(file: pathlib.Path) -> list[dict[str, Any]]:
  """Reads a JSON list of objects or, as in TOFU's .json files, one object per line."""
  with outside.read_of(f"config.data.path: '{file}'", "a JSON list or JSON lines", "download it again"):
    text = outside.text_of(file)
    if text.lstrip().startswith("["):
      rows = json.loads(text)
    else:
      rows = [json.loads(line) for line in text.split("\n") if line.strip()]
  if wrong := [row for row in rows if not isinstance(row, dict)]:
    raise UserError(
      f"config.data.path: '{file}' holds {json.dumps(wrong[0])[:60]}; give one object of columns per row"
    )
  return rows
