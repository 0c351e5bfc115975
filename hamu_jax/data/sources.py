"""Where images come from: one table of sources, and `load`, which checks what they return.

A source is a function `(Request) -> Contents` in a module of its own; adding one is one line in
`SOURCES`. None of them unpickles or runs code that came with the data.
"""

import difflib

import numpy as np

from hamu_jax.data import cifar10_binary, huggingface, tfds
from hamu_jax.data.dataset import (
  Contents,
  Dataset,
  ImageSplit,
  Request,
  checked_labels,
  fingerprint,
  subset,
)
from hamu_jax.errors import UserError

# The split of the digits is part of the dataset: no config changes it.
DIGITS_SPLIT_SEED = 0
DIGITS_TEST_SHARE = 0.2


def read_digits(request: Request) -> Contents:
  """Reads the 1,797 UCI handwritten digits that scikit-learn ships.

  The images are 8 x 8 x 1; their ink counts 0..16 become round(255 / 16 * count). Of each class's
  rows, shuffled by `default_rng(DIGITS_SPLIT_SEED)` class after class, the first fifth (rounded)
  is the test split: 1,438 training and 359 test images.

  Args:
    request: its `path` must be empty, since the data are embedded.

  Returns:
    The two splits and the class names "0".."9".

  Raises:
    UserError: if a path was given.

  Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
  """
  if request.path:
    raise UserError(
        f"config.data.path={request.path!r} has no meaning for the embedded digits: choose"
        " config.data.source for these files, or leave the path empty"
    )
  from sklearn.datasets import load_digits

  counts, labels = load_digits(return_X_y=True)
  images = np.rint(counts.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
  rng = np.random.default_rng(DIGITS_SPLIT_SEED)
  is_test = np.zeros(len(labels), bool)
  for label in range(10):
    rows = rng.permutation(np.flatnonzero(labels == label))
    is_test[rows[: round(DIGITS_TEST_SHARE * len(rows))]] = True
  return Contents(
      ImageSplit(images[~is_test], labels[~is_test]),
      ImageSplit(images[is_test], labels[is_test]),
      tuple(str(label) for label in range(10)),
  )


SOURCES = {
    "digits": read_digits,
    "tfds": tfds.read,
    "huggingface": huggingface.read_hub,
    "parquet": huggingface.read_folder,
    "cifar10_binary": cifar10_binary.read,
}


def load(
    source: str,
    *,
    name: str = "",
    path: str = "",
    train_size: int = 0,
    test_size: int = 0,
    image_key: str = "",
    label_key: str = "",
    seed: int = 0,
) -> Dataset:
  """Loads a dataset whole into memory.

  Args:
    source: a key of `SOURCES`.
    name: the dataset's name at the source (a hub or TFDS name); where files decide, a mere label.
    path: local files (`parquet`, `cifar10_binary`) or the cache folder (`tfds`, `huggingface`).
    train_size: if positive, a class-balanced subset of that many rows, see `balanced_rows`.
    test_size: the same for the test split.
    image_key: field of the image; empty for the only one there is.
    label_key: field of the class number; empty for the only one there is.
    seed: of the subsets.

  Returns:
    The dataset; its fingerprint covers the subset, not what was left out.

  Raises:
    UserError: one line, for anything wrong with the request, the files or the network.
  """
  if source not in SOURCES:
    near = difflib.get_close_matches(source, SOURCES, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UserError(f"config.data.source={source!r}{hint}: choose one of {', '.join(SOURCES)}")
  train, test, class_names = SOURCES[source](Request(name, path, image_key, label_key))
  where = f"config.data.source={source!r}, {path or name or source}"
  train = checked_labels(train, len(class_names), f"{where}, train")
  test = checked_labels(test, len(class_names), f"{where}, test")
  train = subset(train, train_size, seed, "config.data.train_size")
  test = subset(test, test_size, seed, "config.data.test_size")
  if train.images.shape[1:] != test.images.shape[1:]:
    raise UserError(
        f"{where}: train images are {train.images.shape[1:]} but test images are"
        f" {test.images.shape[1:]}; one shape is needed"
    )
  contents = Contents(train, test, class_names)
  return Dataset(name or source, *contents, fingerprint(contents))
