"""Roles whose examples are datasets of their own, beside the one of `config.data`."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from hamu_jax.data.dataset import Contents, ImageSplit, checked_labels
from hamu_jax.data.encoded import EncodedImages
from hamu_jax.errors import UserError

# Roles that may have a dataset of their own; `config.data` is that of the retain set.
ROLES = ("forget", "duplicate", "test")
# Fields of `config.data` and `config.text` whose names in a section such as `config.data.forget_set` differ.
_RENAMED = {
  "image_key": "input_key",
  "question_key": "input_key",
  "label_key": "target_key",
  "answer_key": "target_key",
}


class Place(NamedTuple):
  """Where the examples of a role are, by the fields of `config.data`; "" where nothing is said.

  Attributes:
    source: key of the table of sources.
    name: name of the dataset at the source.
    path: local folder or file, or the source's cache.
    subset: configuration of the dataset.
    input_key: column of the images or questions.
    target_key: column of the class numbers or answers.
    split: split of the dataset; texts name theirs elsewhere.
  """

  source: str = ""
  name: str = ""
  path: str = ""
  subset: str = ""
  input_key: str = ""
  target_key: str = ""
  split: str = ""

  @property
  def is_given(self) -> bool:
    """Whether any field of the dataset, beside the split, says something."""
    return any(self._replace(split=""))

  def within(self, base: "Place") -> "Place":
    """This place, with what it does not say taken from that of the retain set.

    A place that says its source, name or path is another dataset, and takes over none of name, path and
    subset.
    """
    other = self.source or self.name or self.path
    return Place(
      self.source or base.source,
      *((self.name, self.path, self.subset) if other else (base.name, base.path, self.subset or base.subset)),
      self.input_key or base.input_key,
      self.target_key or base.target_key,
      self.split or base.split,
    )


@contextlib.contextmanager
def reading(role: str) -> Iterator[None]:
  """Reads the dataset of a role: errors name its fields where a source names those of `config.data`."""
  fields = "|".join((*Place._fields[:4], *_RENAMED))

  def named(field: re.Match) -> str:
    return f"config.data.{role}_set.{_RENAMED.get(field[1], field[1])}"

  try:
    yield
  except UserError as error:
    message = re.sub(r"config\.data\.(train|test)_split", f"config.data.{role}_split", str(error))
    raise UserError(re.sub(rf"config\.(?:data|text)\.({fields})\b", named, message)) from error


def joined(retain: Contents, own: dict[str, Contents]) -> Contents:
  """Joins the datasets of the roles into one, whose training examples know whether they are to be forgotten.

  Class numbers are translated by the names of the classes: those of the retain set, followed by what only
  the forget set and the duplicates have.

  Args:
    retain: dataset of the retain set, and of the test set unless that has its own.
    own: {role of `ROLES`: its dataset, whose `train` or, for the test set, `test` are the examples}.

  Returns:
    The dataset: retain, duplicate and forget examples, in this order.

  Raises:
    UserError: the test set has classes that cannot be learnt, only some datasets name their classes, or the
      images differ in shape.
  """
  sets = {"retain": retain} | {role: own[role] for role in ("duplicate", "forget") if role in own}
  names = _class_names(sets)
  parts = {
    role: _translated(contents.train, contents.class_names, names, role) for role, contents in sets.items()
  }
  test = own.get("test", retain)
  test_split = _translated(test.test, test.class_names, names, "test")
  if len(sets) == 1:
    return retain._replace(test=test_split)
  sizes = [len(part.labels) for part in parts.values()]
  total = sum(sizes)
  return Contents(
    ImageSplit(
      _stacked({role: part.images for role, part in parts.items()}),
      np.concatenate([part.labels for part in parts.values()]),
    ),
    test_split,
    names,
    forgotten=np.arange(total) >= total - sizes[-1] if "forget" in own else None,
  )


def _class_names(sets: dict[str, Contents]) -> tuple[str, ...]:
  """The classes of all sets. Names and bare numbers cannot be told apart from each other."""
  numbered = {role: _is_numbered(contents.class_names) for role, contents in sets.items()}
  if len(set(numbered.values())) > 1:
    named, bare = (next(role for role in sets if numbered[role] == kind) for kind in (False, True))
    raise UserError(
      f"the {named} set names its classes ({', '.join(sets[named].class_names[:3])}, ...) and the {bare} set "
      "only numbers them; give datasets that both name them, or both number them"
    )
  return tuple(dict.fromkeys(name for contents in sets.values() for name in contents.class_names))


def _is_numbered(names: Iterable[str]) -> bool:
  return all(name == str(number) for number, name in enumerate(names))


def _translated(split: ImageSplit, own: tuple[str, ...], names: tuple[str, ...], role: str) -> ImageSplit:
  """The split with its class numbers counting in `names`."""
  split = checked_labels(split, len(own), f"the {role} set")
  if unknown := [name for name in own if name not in names]:
    raise UserError(
      f"config.data.test_set: it has the class {unknown[0]!r}, which no example to learn has "
      f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}); give a dataset of the same classes"
    )
  number = {name: index for index, name in enumerate(names)}
  return split._replace(labels=np.array([number[name] for name in own], np.int32)[split.labels])


def _stacked(images: dict[str, np.ndarray | EncodedImages]) -> np.ndarray | EncodedImages:
  """The images of all roles, one role after the other."""
  encoded = [part for part in images.values() if isinstance(part, EncodedImages)]
  if len(encoded) == len(images):
    return EncodedImages.joined(encoded, "training image (counted over retain, duplicate and forget set)")
  arrays = {role: part.whole() if isinstance(part, EncodedImages) else part for role, part in images.items()}
  shapes = {role: part.shape[1:] for role, part in arrays.items()}
  if len(set(shapes.values())) > 1:
    described = ", ".join(f"{role} {shape}" for role, shape in shapes.items())
    raise UserError(
      f"the images of the sets differ in shape ({described}); one is needed, so set config.data.image_size, "
      "or give images of as many channels"
    )
  return np.concatenate(list(arrays.values()))
