"""What a loaded dataset is, its checks, its class-balanced subsets and its fingerprint."""

import hashlib
import json
from typing import NamedTuple

import numpy as np

from hamu_jax.errors import UserError


class ImageSplit(NamedTuple):
  """Images with their class numbers, in the order of the source."""

  images: np.ndarray  # [N, H, W, C] uint8
  labels: np.ndarray  # [N] int32


class Dataset(NamedTuple):
  """A labelled image dataset, whole in memory."""

  name: str
  train: ImageSplit
  test: ImageSplit
  class_names: tuple[str, ...]
  fingerprint: str  # sha256 of the contents, in hexadecimal


class Request(NamedTuple):
  """What the user asked of a source: the fields of `config.data` that sources read."""

  name: str
  path: str
  image_key: str  # "" lets the source find its only image field
  label_key: str  # "" lets the source find its only class-label field


class Contents(NamedTuple):
  """What a source hands back, unchecked.

  The labels may be of any integer type, and the images anything that gives [n, H, W, C] uint8 when
  it is indexed by rows: encoded images are decoded only where they are kept.
  """

  train: ImageSplit
  test: ImageSplit
  class_names: tuple[str, ...]


def balanced_rows(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
  """Chooses a class-balanced subset of rows.

  Every class's rows are shuffled by `seed` and dealt one a class and round, classes in ascending
  order, until `size` rows are dealt: class counts differ by at most one while no class runs out,
  and a smaller subset of the same seed lies within a larger one.

  Args:
    labels: [N] class numbers.
    size: how many rows to choose, at most N.
    seed: of the shuffle.

  Returns:
    [size] row numbers, ascending.
  """
  order = np.random.default_rng(seed).permutation(len(labels))
  by_class = order[np.argsort(labels[order], kind="stable")]
  sorted_labels = labels[by_class]
  rounds = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)
  return np.sort(by_class[np.lexsort((sorted_labels, rounds))[:size]])


def subset(split: ImageSplit, size: int, seed: int, field: str) -> ImageSplit:
  """Reduces a split to `size` class-balanced rows; 0 keeps all of it.

  Args:
    split: what to reduce.
    size: how many rows to keep.
    seed: of the choice, see `balanced_rows`.
    field: the config field that holds `size`, for the error message.

  Returns:
    The chosen rows in their original order.

  Raises:
    UserError: if `size` is negative or larger than the split.
  """
  if not 0 <= size <= len(split.labels):
    raise UserError(f"{field}={size}: choose 1..{len(split.labels)}, or 0 for the whole split")
  rows = balanced_rows(split.labels, size, seed) if size else slice(None)
  return ImageSplit(split.images[rows], split.labels[rows])


def checked_labels(split: ImageSplit, classes: int, name: str) -> ImageSplit:
  """Checks that a split is not empty and that its labels lie within the classes.

  Args:
    split: [N] labels of any integer type.
    classes: how many classes there are.
    name: of the split, for the error message.

  Returns:
    The split with labels of type int32.

  Raises:
    UserError: for an empty split or a label outside 0..classes-1.
  """
  if not len(split.labels):
    raise UserError(f"{name}: the split is empty")
  wrong = np.flatnonzero((split.labels < 0) | (split.labels >= classes))
  if len(wrong):
    raise UserError(
        f"{name}: row {wrong[0]} has label {split.labels[wrong[0]]}, outside the {classes} classes"
        f" 0..{classes - 1} ({len(wrong)} such rows)"
    )
  return split._replace(labels=split.labels.astype(np.int32))


def fingerprint(contents: Contents) -> str:
  """Hashes everything that training can see: class names, shapes, images and labels.

  Args:
    contents: the splits, as they will be used.

  Returns:
    The sha256 in hexadecimal; the same on every platform.
  """
  shapes = [contents.train.images.shape, contents.test.images.shape]
  digest = hashlib.sha256(json.dumps([contents.class_names, shapes]).encode())
  for split in (contents.train, contents.test):
    digest.update(np.ascontiguousarray(split.images))
    digest.update(np.ascontiguousarray(split.labels, dtype="<i4"))
  return digest.hexdigest()
