"""Where images come from: one table of sources, and `load`, which checks what they return.

A source is a function `(Request) -> Contents` in a module of its own; adding one is one line in
`SOURCES`. None of them unpickles or runs code that came with the data.
"""

import difflib
import types
from collections.abc import Mapping

import numpy as np

from hamu_jax.data import cifar10_binary, huggingface, separate, tfds
from hamu_jax.data.dataset import (
  Contents,
  Dataset,
  ImageSplit,
  Request,
  checked_labels,
  choose_subset,
  fingerprint,
)
from hamu_jax.data.encoded import EncodedImages, resized
from hamu_jax.errors import UserError

# The split of the digits is part of the dataset; no configuration changes it.
DIGITS_SPLIT_SEED = 0
DIGITS_TEST_SHARE = 0.2


def read_digits(request: Request) -> Contents:
  """Reads the 1,797 UCI handwritten digits that scikit-learn ships.

  The images are 8 x 8 x 1; their ink counts 0..16 become round(255 / 16 * count). The examples of each
  class are shuffled by `default_rng(DIGITS_SPLIT_SEED)`, class after class, and the first fifth (rounded)
  is the test split. There are 1,438 training and 359 test images.

  Args:
    request: its `path` must be empty, because the data are embedded.

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
  subset: str = "",
  test_split: str = "",
  train_size: int = 0,
  test_size: int = 0,
  image_key: str = "",
  label_key: str = "",
  image_size: int = 0,
  stream: bool = False,
  seed: int = 0,
  train_split: str = "",
  sets: Mapping[str, separate.Place] = types.MappingProxyType({}),
) -> Dataset:
  """Loads a dataset into memory, or for streaming.

  Args:
    source: a key of `SOURCES`.
    name: the dataset's name at the source (a hub or TFDS name); for sources that read local files, a label.
    path: local files (`parquet`, `cifar10_binary`) or the cache folder (`tfds`, `huggingface`).
    subset: configuration of a hub dataset (svhn's "cropped_digits"), or the subfolder of a
      `parquet` folder; empty for the default or only one.
    test_split: the split to evaluate on (ImageNet's is "validation"); empty for "test".
    train_size: number of training examples in a class-balanced subset, see `balanced_subset`; 0 for all.
    test_size: the same for the test split.
    image_key: field of the image; empty for the only one there is.
    label_key: field of the class number; empty for the only one there is.
    image_size: height and width in pixels to which `encoded.resize` brings every image; 0 keeps their
      size, and then all images must have one shape.
    stream: whether images stay encoded on disk, memory-mapped, and are decoded when they are indexed
      (always into 3 channels). Needs `image_size` and a source of encoded images.
    seed: seed of the subsets.
    train_split: the split to learn, that of the retain set if the forget set is separate; empty for "train".
    sets: {role of `separate.ROLES`: its own place, whose empty fields are those above}.

  Returns:
    The dataset. Its fingerprint covers the subset only.

  Raises:
    UserError: one line, for anything wrong with the request, the files or the network.
  """
  _check_request(source, stream, image_size)
  train_split, test_split = train_split or "train", test_split or "test"
  place = separate.Place(source, name, path, subset, image_key, label_key, train_split)
  contents = _contents(place, "" if "test" in sets else test_split, image_size, stream)
  if sets:
    own = {
      role: _contents_of_role(role, each.within(place), image_size, stream) for role, each in sets.items()
    }
    contents = separate.joined(contents, own)
  where = f"config.data.source={source!r}, {path or name or source}"
  classes = len(contents.class_names)
  train = checked_labels(contents.train, classes, f"{where}, {train_split}")
  test = checked_labels(contents.test, classes, f"{where}, {test_split}")
  train_indices = choose_subset(train.labels, train_size, seed, "config.data.train_size")
  test_rows = choose_subset(test.labels, test_size, seed, "config.data.test_size")
  kept = Contents(
    _read(train, train_indices, image_size, stream),
    _read(test, test_rows, image_size, stream),
    contents.class_names,
    forgotten=None if contents.forgotten is None else contents.forgotten[train_indices],
  )
  _check_shapes(kept, where)
  return _dataset(name or source, contents, kept, train_indices)


def _contents(
  place: separate.Place, test_split: str, image_size: int, stream: bool, whole: bool = True
) -> Contents:
  """Reads the split of a place and, unless it is empty, that of the test set."""
  return SOURCES[place.source](
    Request(
      place.name,
      place.path,
      place.input_key,
      place.target_key,
      place.subset,
      test_split or place.split,
      image_size,
      stream,
      place.split,
      whole,
    )
  )


def _contents_of_role(role: str, place: separate.Place, image_size: int, stream: bool) -> Contents:
  """Reads the dataset of a role; errors name its fields."""
  with separate.reading(role):
    return _contents(place, "", image_size, stream, whole=False)


def _check_request(source: str, stream: bool, image_size: int) -> None:
  """Refuses an unknown source, and streaming of images of several sizes."""
  if source not in SOURCES:
    near = difflib.get_close_matches(source, SOURCES, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UserError(f"config.data.source={source!r}{hint}: choose one of {', '.join(SOURCES)}")
  if stream and not image_size:
    raise UserError(
      "config.data.stream=True needs config.data.image_size: the one height and width that images"
      " are decoded to"
    )


def _check_shapes(contents: Contents, where: str) -> None:
  """Refuses splits whose images differ in shape."""
  train, test = (split.images.shape[1:] for split in (contents.train, contents.test))
  if train != test:
    raise UserError(
      f"{where}: train images are {train} but test images are {test}; one shape is needed, so set"
      " config.data.image_size"
    )


def _dataset(label: str, contents: Contents, kept: Contents, train_indices: np.ndarray) -> Dataset:
  """The dataset of the kept examples, with the indices that its training examples had originally."""
  places, names = contents.train_indices, contents.train_names
  return Dataset(
    label,
    kept.train,
    kept.test,
    kept.class_names,
    fingerprint(kept),
    train_indices=train_indices if places is None else places[train_indices],
    train_total=len(contents.train.labels),
    train_names=None if names is None else names[train_indices],
    train_ordered=contents.train_ordered,
    forgotten=kept.forgotten,
  )


def _read(split: ImageSplit, rows: np.ndarray, image_size: int, stream: bool) -> ImageSplit:
  """Reduces a split to some examples, decoded unless it is streamed."""
  labels = split.labels[rows]
  if isinstance(split.images, EncodedImages):
    images = split.images.select(rows)
    return ImageSplit(images if stream else images.whole(), labels)
  if stream:
    raise UserError(
      "config.data.stream=True: this source holds all its images in memory whole; choose"
      " config.data.source huggingface, parquet or tfds, or config.data.stream=False"
    )
  images = split.images[rows]
  return ImageSplit(resized(images, image_size) if image_size else images, labels)
