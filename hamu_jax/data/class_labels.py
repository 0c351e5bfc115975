"""Reads a column of classes, whatever type its values have, as class numbers."""

from typing import Any

import numpy as np

from hamu_jax.errors import UserError

# What a column of classes may hold, for error messages.
KINDS = "class numbers (integers), words or booleans"
# Most classes of examples that are a part of a dataset.
MOST_CLASSES = 1_000_000


def may_hold(kind: Any) -> bool:
  """Whether a `pyarrow.DataType` can be one of classes."""
  from pyarrow import types

  checks = (types.is_integer, types.is_boolean, types.is_floating, types.is_string, types.is_large_string)
  return any(check(kind) for check in checks)


def read(
  columns: dict[str, Any], names: dict[str, list[str] | None], field: str, *, whole: bool = True
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Reads the classes of all splits.

  Words and booleans become the numbers of their sorted values. A split whose metadata list the classes in
  another order than the first split's is translated by their names.

  Args:
    columns: the column of each split, as `pyarrow.ChunkedArray`.
    names: class names of each split's metadata; None if it has none.
    field: the config field that names the column, with its value, for error messages.
    whole: whether these are all examples, so that there are more of them than classes; a part, such as a
      forget set, may be of few examples.

  Returns:
    ({split: [N] int64 class numbers}, class names).

  Raises:
    UserError: for missing or fractional values, or splits with different classes.
  """
  for split, column in columns.items():
    if column.null_count:
      raise UserError(
        f"{field}: {column.null_count} of {len(column)} {split} examples have no label; choose a split or"
        " column with all labels"
      )
  values = {split: column.to_numpy() for split, column in columns.items()}
  if any(array.dtype.kind in "OUT" or array.dtype == bool for array in values.values()):
    return _of_words(values, field, whole)
  labels = {split: _whole(array, f"{field}: {split}") for split, array in values.items()}
  first = next(iter(labels))
  own = names[first]
  if own is None:
    return labels, tuple(_numbered(labels[first], field, whole))
  for split, listed in names.items():
    if listed is not None and listed != own:
      labels[split] = _translated(labels[split], listed, own, f"{field}: {split} and {first}")
  return labels, tuple(own)


def _of_words(
  values: dict[str, np.ndarray], field: str, whole: bool
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  kinds = {type(value) for array in values.values() for value in array.tolist()}
  if len(kinds) > 1:
    raise UserError(
      f"{field} holds values of several types ({', '.join(sorted(kind.__name__ for kind in kinds))});"
      f" give {KINDS}"
    )
  words = sorted({value for array in values.values() for value in array.tolist()})
  if whole and sum(map(len, values.values())) < 2 * len(words):
    raise UserError(
      f"{field} holds {len(words)} different words in {sum(map(len, values.values()))} rows, so it names no"
      f" classes; choose the column of {KINDS}"
    )
  number = {word: index for index, word in enumerate(words)}
  labels = {split: np.array([number[v] for v in array.tolist()], np.int64) for split, array in values.items()}
  return labels, tuple(map(str, words))


def _whole(values: np.ndarray, where: str) -> np.ndarray:
  """Integers, also if they are stored as floats."""
  if values.dtype.kind == "f":
    wrong = np.flatnonzero(~(values == np.rint(values)) | (np.abs(values) >= 2**31))
    if len(wrong):
      raise UserError(
        f"{where} example {wrong[0]} has the label {values[wrong[0]]}, which is no class number; choose the"
        f" column of {KINDS}"
      )
  return values.astype(np.int64)


def _numbered(labels: np.ndarray, field: str, whole: bool) -> list[str]:
  """Names the classes "0".."K-1", for metadata that do not name them."""
  classes = int(labels.max()) + 1 if len(labels) else 0
  if classes > (len(labels) if whole else MOST_CLASSES):
    raise UserError(
      f"{field} holds {classes - 1} but only {len(labels)} rows, so it is not a class number; choose the"
      " column of class numbers"
    )
  return [str(label) for label in range(classes)]


def _translated(labels: np.ndarray, listed: list[str], own: list[str], where: str) -> np.ndarray:
  """Class numbers of `own`, for labels that count in `listed`."""
  if sorted(listed) != sorted(own):
    raise UserError(
      f"{where} have different classes ({', '.join(listed[:3])}, ... and {', '.join(own[:3])}, ...); give"
      " splits of one dataset"
    )
  numbers = np.array([own.index(name) for name in listed])
  inside = (labels >= 0) & (labels < len(listed))
  return np.where(inside, numbers[np.where(inside, labels, 0)], labels)
