"""What an image experiment evaluates."""

import numpy as np

from hamu_jax import data
from hamu_jax.paired import Paired
from hamu_jax.vision import task as vision


def dataset(train_labels, test_labels):
  def split(labels):
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return data.ImageSplit(images, np.asarray(labels, np.int32))

  count = len(train_labels)
  return data.Dataset(
    "toy", split(train_labels), split(test_labels), ("a", "b", "c"), "f", np.arange(count), count, None
  )


def labels_of(splits):
  return {name: list(part.labels[part.indices]) for name, part in splits.items()}


def test_whole_forgotten_classes_split_the_test_set():
  splits = vision.evaluation_splits(
    dataset([0, 1, 2, 0], [0, 1, 0, 2, 2]),
    Paired(np.array([1, 2]), np.array([0, 3])),
    np.array([], int),
    (0,),
  )
  assert labels_of(splits) == {
    "retain": [1, 2],
    "forget": [0, 0],
    "test": [0, 1, 0, 2, 2],
    "test_retain": [1, 2, 2],
    "test_forget": [0, 0],
  }
  assert list(splits["test_retain"].images[splits["test_retain"].indices].ravel()) == [1, 3, 4]


def test_validation_and_levels_of_memorization_are_evaluated():
  splits = vision.evaluation_splits(
    dataset([0, 1, 2, 0], [0]),
    Paired(np.array([1]), np.array([0])),
    np.array([2]),
    levels={"high": np.array([0, 1])},
  )
  assert labels_of(splits) == {
    "retain": [1],
    "forget": [0],
    "test": [0],
    "validation": [2],
    "high": [0, 1],
  }


def test_other_forget_sets_do_not():
  splits = vision.evaluation_splits(
    dataset([0, 1], [0, 1]), Paired(np.array([0]), np.array([1])), np.array([], int)
  )
  assert list(splits) == ["retain", "forget", "test"]
