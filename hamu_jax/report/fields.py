"""Fields of config.json: their roles in a comparison, and their values as keys and words.

A name is dotted, e.g. ``method.name``.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from hamu_jax.data import separate

METHOD = "method.name"
# Sections that the original and the retrained model do not depend on.
_AFTERWARDS = ("method", "mask", "sam", "pairing", "devices", "mesh")
# Fields that identify a dataset if its fingerprint is unknown or differs only by a draw of examples.
DATASET = (
  "data.source",
  "data.name",
  "data.subset",
  "data.train_split",
  "data.test_split",
  "data.train_size",
  "data.test_size",
  "data.image_size",
  "data.label_key",
)
# Fields that describe where the data are, not what they contain.
PLACES = (
  "data.path",
  *DATASET,
  "data.forget_split",
  "data.duplicate_split",
  *(f"data.{role}_set.{field}" for role in separate.ROLES for field in separate.Place._fields),
)


def is_task_field(field: str) -> bool:
  """Whether a field belongs to the task, so that the original and retrained model depend on it."""
  return field.startswith("sam.train_") or field.split(".")[0] not in _AFTERWARDS


def is_seed(name: str) -> bool:
  """Whether a field is a seed, in any section."""
  return name.split(".")[-1] == "seed"


def is_number(value: Any) -> TypeGuard[int | float]:
  """Whether a value is a number; a bool is not."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def numbers_of(tree: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
  """Yields the numbers of nested objects by dotted name, with NaN for null, a number that was not finite."""
  for name, value in tree.items() if isinstance(tree, Mapping) else ():
    if isinstance(value, Mapping):
      yield from numbers_of(value, f"{prefix}{name}.")
    elif value is None or is_number(value):
      yield f"{prefix}{name}", math.nan if value is None else float(value)


def in_words(value: Any) -> str:
  """The value of a field in words."""
  if value is None:
    return "none"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, list):
    return " ".join(map(in_words, value)) or "none"
  return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def key_of(config: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
  """Values as JSON, which can be compared and hashed; 1 and 1.0 are equal, an absent field is null."""
  return tuple(
    json.dumps(float(value) if is_number(value) else value, sort_keys=True)
    for value in (config.get(name) for name in names)
  )


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
  """Groups items by their key, in order of appearance."""
  found: dict[Any, list[Any]] = {}
  for item in items:
    found.setdefault(key(item), []).append(item)
  return found


def by_preference(fields: Sequence[str]) -> list[str]:
  """Sorts fields: those of the task first, then the method and its constraint, then all others."""
  first = (METHOD, "method.constraint_ratio", "method.constraint")
  return sorted(
    fields,
    key=lambda name: (
      not is_task_field(name),
      first.index(name) if name in first else len(first),
      name.startswith("method"),
    ),
  )


def sort_key(value: Any) -> tuple[int, float, str]:
  """A sort key that puts numbers first, by size."""
  return (0, value, "") if is_number(value) else (1, 0.0, in_words(value))
