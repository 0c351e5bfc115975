"""TensorFlow Datasets, read through `data_source` without TensorFlow wherever TFDS allows it.

TFDS needs TensorFlow to download and prepare a dataset and to read the TFRecord format. This module
prepares datasets as ArrayRecord, which later runs read without TensorFlow.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hamu_jax.data.dataset import Contents, ImageSplit, Request
from hamu_jax.data.encoded import EncodedImages
from hamu_jax.errors import CONNECT_SECONDS, UserError, first_line, unreachable

# Features that name a record, in ImageNet and in CIFAR.
NAME_KEYS = ("file_name", "id")
_NEEDS_EXTRA = "config.data.source='tfds' needs {}: pip install -e '.[tensorflow]'"


def read(request: Request) -> Contents:
  """Reads two splits of a TFDS dataset.

  Args:
    request: `name` is the TFDS name; `path`, if not empty, is the TFDS data folder. `image_key` and
      `label_key` default to "image" and "label".

  Returns:
    Both splits and the class names of the label feature.

  Raises:
    UserError: if TFDS is not installed; if the dataset, a split or a feature does not exist; if the
      dataset can be neither found on disk nor downloaded; or if its files are corrupt.
  """
  try:
    import tensorflow_datasets
  except ImportError as error:
    raise UserError(_NEEDS_EXTRA.format(error.name)) from None

  builder = _prepared(tensorflow_datasets, request)
  image_key, label_key = request.image_key or "image", request.label_key or "label"
  for field, key in (("image_key", image_key), ("label_key", label_key)):
    if key not in builder.info.features:
      raise UserError(
        f"config.data.{field}={key!r}: tfds {request.name!r} has no such feature; choose from"
        f" {', '.join(builder.info.features)}"
      )
  wanted = dict.fromkeys((request.train_split, request.test_split))
  missing = [split for split in wanted if split not in builder.info.splits]
  if missing:
    raise UserError(
      f"config.data.name={request.name!r} has no {missing[0]!r} split at tfds, only"
      f" {', '.join(builder.info.splits)}; choose one with {request.split_field(missing[0])}"
    )
  class_names = getattr(builder.info.features[label_key], "names", None)
  if not class_names:
    raise UserError(
      f"config.data.label_key={label_key!r}: this tfds feature is not a class label; choose from"
      f" {', '.join(builder.info.features)}"
    )
  splits, names = {}, {}
  for split in wanted:
    try:
      records = _records(tensorflow_datasets, builder, split, image_key, request.stream)
      labels, names[split] = _labels(records, label_key)
    except UserError:
      raise
    except ImportError as error:
      raise UserError(_NEEDS_EXTRA.format(error.name)) from None
    except (OSError, RuntimeError, TypeError, ValueError) as error:
      raise UserError(
        f"tfds {request.name!r} cannot be read ({first_line(error)}): remove it from the"
        " TFDS data folder, to prepare it again"
      ) from None
    images = EncodedImages(
      _reader(records, image_key), np.arange(len(labels)), f"{split} image", request.image_size
    )
    splits[split] = ImageSplit(images, labels)
  rows, file_names = _origin(names[request.train_split])
  return Contents(
    splits[request.train_split],
    splits[request.test_split],
    tuple(class_names),
    rows,
    file_names,
    train_ordered=rows is not None,
  )


def _prepared(tensorflow_datasets, request: Request):
  """Returns a builder whose files are on disk; downloads and prepares them if they are not."""
  options = {"data_dir": request.path or None}
  try:
    builder = tensorflow_datasets.builder(request.name, **options)
    if builder.is_prepared():
      return builder
    builder = tensorflow_datasets.builder(request.name, file_format="array_record", **options)
  except ValueError as error:
    reason = first_line(error)
    raise UserError(
      f"config.data.name={request.name!r}: tfds says {reason!r}; check the name in the TFDS catalog"
    ) from None
  _check_network(request.name, builder)
  try:
    builder.download_and_prepare()
  except ImportError as error:
    raise UserError(_NEEDS_EXTRA.format(error.name) + " (it prepares the dataset)") from None
  except OSError as error:
    raise unreachable(f"tfds {request.name!r}", error) from None
  return builder


def _check_network(name: str, builder) -> None:
  """Requests one of the dataset's addresses once, because TFDS itself retries for minutes."""
  for url in list(builder.url_infos or ())[:1]:
    import requests  # TFDS's own client.

    try:
      requests.head(url, timeout=CONNECT_SECONDS)
    except requests.RequestException as error:
      raise unreachable(f"tfds {name!r}", error) from None


def _records(
  tensorflow_datasets, builder, split: str, image_key: str, stream: bool
) -> Sequence[dict[str, Any]]:
  """Returns the records in the order of the files, with their images still encoded."""
  decoders = {image_key: tensorflow_datasets.decode.SkipDecoding()}
  try:
    return builder.as_data_source(split=split, decoders=decoders)
  except NotImplementedError:  # Another program prepared the dataset as TFRecord.
    if stream:
      raise UserError(
        "config.data.stream=True: this tfds dataset was prepared as TFRecord, which cannot be"
        " read by rows; name another folder in config.data.path, to prepare it as ArrayRecord"
      ) from None
  records = builder.as_dataset(split=split, decoders=decoders, shuffle_files=False)
  return list(tensorflow_datasets.as_numpy(records))


def _labels(records: Sequence[dict[str, Any]], label_key: str) -> tuple[np.ndarray, list]:
  """Collects the labels of the records and the names of those that have one."""
  labels, names = [], []
  for record in records:
    labels.append(record[label_key])
    named = (record[key] for key in NAME_KEYS if isinstance(record.get(key), bytes))
    names += [name.decode() for name in named][:1]
  return np.array(labels), names


def _reader(records: Sequence[dict[str, Any]], image_key: str) -> Callable[[int], bytes]:
  return lambda row: records[row][image_key]


def _origin(names: list[str]) -> tuple[np.ndarray | None, np.ndarray | None]:
  """Finds the original index of each training record; TFDS shuffles the records that it prepares.

  Returns:
    The original indices, if the names contain them (CIFAR's "train_00042"), and the names. Either is None
    if it is not known.
  """
  if not names:
    return None, None
  found = [re.fullmatch(r"train_(\d+)", name) for name in names]
  numbers = [int(number[1]) for number in found if number]
  rows = np.array(numbers) if len(numbers) == len(names) else None
  if rows is not None and not np.array_equal(np.sort(rows), np.arange(len(rows))):
    rows = None
  return rows, np.array(names, np.dtypes.StringDType())
