"""What an image experiment evaluates."""

import numpy as np

from hamu_jax import data, vision
from hamu_jax.paired import Paired


def dataset(train_labels, test_labels):
  def split(labels):
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return data.ImageSplit(images, np.asarray(labels, np.int32))

  return data.Dataset("toy", split(train_labels), split(test_labels), ("a", "b", "c"), "f")


def test_whole_forgotten_classes_split_the_test_set():
  splits = vision.evaluation_splits(
      dataset([0, 1, 2, 0], [0, 1, 0, 2, 2]), Paired(np.array([1, 2]), np.array([0, 3])), (0,)
  )
  assert {name: list(labels) for name, (_, labels) in splits.items()} == {
      "retain": [1, 2], "forget": [0, 0], "test": [0, 1, 0, 2, 2],
      "test_retain": [1, 2, 2], "test_forget": [0, 0],
  }
  assert list(splits["test_retain"][0].ravel()) == [1, 3, 4]


def test_other_forget_sets_do_not():
  splits = vision.evaluation_splits(
      dataset([0, 1], [0, 1]), Paired(np.array([0]), np.array([1])), ()
  )
  assert list(splits) == ["retain", "forget", "test"]
