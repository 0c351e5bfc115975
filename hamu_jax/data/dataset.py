"""The types of a loaded dataset, its checks, its class-balanced subsets and its fingerprint."""

import hashlib
import json
from typing import NamedTuple

import numpy as np

from hamu_jax.data.encoded import EncodedImages
from hamu_jax.errors import UserError


class ImageSplit(NamedTuple):
  """Images with their class numbers, in the order of the source."""

  images: np.ndarray | EncodedImages  # [N, H, W, C] uint8, or what decodes to that when indexed
  labels: np.ndarray  # [N] int32


class Dataset(NamedTuple):
  """A labelled image dataset: whole in memory or, streamed, decoded where it is indexed."""

  name: str
  train: ImageSplit
  test: ImageSplit
  class_names: tuple[str, ...]
  fingerprint: str  # sha256 of the contents, in hexadecimal
  train_indices: np.ndarray  # [N] int64, the index of each training image in the original training split
  train_total: int  # examples of the original training split
  train_names: np.ndarray | None  # [N] str, the training images' file names, where they have any
  train_ordered: bool = True  # whether `train_indices` is known; a source may have shuffled its examples
  forgotten: np.ndarray | None = None  # [N] bool, see `Contents`


class Request(NamedTuple):
  """What the user asks of a source: the fields of `config.data` that sources read."""

  name: str
  path: str
  image_key: str  # "" lets the source find its only image field
  label_key: str  # "" lets the source find its only class-label field
  subset: str  # configuration of a hub dataset; "" is its default
  test_split: str  # the split that is evaluated
  image_size: int  # height and width to which images are resized; 0 keeps their size
  stream: bool  # images stay where the source keeps them
  train_split: str = "train"  # the split that is learnt
  whole: bool = True  # whether all training examples are asked for, or the dataset of one role, maybe of few

  def split_field(self, split: str) -> str:
    """The config field that names a split, for error messages."""
    return f"config.data.{'train' if split == self.train_split else 'test'}_split"


class Contents(NamedTuple):
  """What a source returns, not yet checked: whole splits, with labels of any integer type."""

  train: ImageSplit
  test: ImageSplit
  class_names: tuple[str, ...]
  # [N] the training examples' places in the original training split; None if the source keeps its order
  train_indices: np.ndarray | None = None
  train_names: np.ndarray | None = None  # [N] str, the training images' file names, if any
  train_ordered: bool = True  # False if the source has shuffled its examples and nothing numbers them
  # [N] whether a training example comes from the forget set's own dataset; None if that has none
  forgotten: np.ndarray | None = None


def balanced_subset(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
  """Chooses a class-balanced subset of examples.

  The examples of each class are shuffled by `seed`. Rounds then take one example of each class, in
  ascending order of the classes, until `size` examples are chosen. So class counts differ by at most one
  while no class runs out, and a smaller subset of the same seed lies within a larger one.

  Args:
    labels: [N] class numbers.
    size: number of examples to choose, at most N.
    seed: seed of the shuffle.

  Returns:
    [size] indices of examples, ascending.
  """
  order = np.random.default_rng(seed).permutation(len(labels))
  by_class = order[np.argsort(labels[order], kind="stable")]
  sorted_labels = labels[by_class]
  rounds = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)
  return np.sort(by_class[np.lexsort((sorted_labels, rounds))[:size]])


def choose_subset(labels: np.ndarray, size: int, seed: int, field: str) -> np.ndarray:
  """Chooses `size` class-balanced examples of a split; 0 keeps all of it.

  Args:
    labels: [N] class numbers of the split.
    size: number of examples to keep.
    seed: seed of the choice, see `balanced_subset`.
    field: the config field that holds `size`, for the error message.

  Returns:
    [n] indices of examples, ascending.

  Raises:
    UserError: if `size` is negative or larger than the split.
  """
  if not 0 <= size <= len(labels):
    raise UserError(f"{field}={size}: choose 1..{len(labels)}, or 0 for the whole split")
  return balanced_subset(labels, size, seed) if size else np.arange(len(labels))


def checked_labels(split: ImageSplit, classes: int, name: str) -> ImageSplit:
  """Checks that a split is not empty and that its labels lie within the classes.

  Args:
    split: images with [N] labels of any integer type.
    classes: number of classes.
    name: name of the split, for the error message.

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
      f"{name}: example {wrong[0]} has label {split.labels[wrong[0]]}, outside the {classes} classes"
      f" 0..{classes - 1} ({len(wrong)} such examples)"
    )
  return split._replace(labels=split.labels.astype(np.int32))


def fingerprint(contents: Contents) -> str:
  """Hashes everything that training can see: class names, shapes, images, labels, and a separate forget set.

  Streamed images enter as their encoded bytes, which are read once but not decoded.

  Args:
    contents: the splits, as they will be used.

  Returns:
    The sha256 in hexadecimal, the same on every platform.
  """
  shapes = [contents.train.images.shape, contents.test.images.shape]
  digest = hashlib.sha256(json.dumps([contents.class_names, shapes]).encode())
  for split in (contents.train, contents.test):
    if isinstance(split.images, EncodedImages):
      digest.update(split.images.digest())
    else:
      digest.update(np.ascontiguousarray(split.images).data)
    digest.update(np.ascontiguousarray(split.labels, dtype="<i4").data)
  if contents.forgotten is not None:
    digest.update(np.packbits(contents.forgotten).data)
  return digest.hexdigest()
