"""TensorFlow Datasets, read through `data_source` without TensorFlow wherever TFDS allows it.

TFDS needs TensorFlow to download and prepare a dataset and to read the TFRecord format; a dataset
prepared here is prepared as ArrayRecord, which later runs read without it.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from hamu_jax.data.dataset import Contents, ImageSplit, Request
from hamu_jax.data.failures import CONNECT_SECONDS, first_line, unreachable
from hamu_jax.errors import UserError

_NEEDS_EXTRA = "config.data.source='tfds' needs {}: pip install -e '.[tensorflow]'"


def read(request: Request) -> Contents:
  """Reads the `train` and `test` splits of a TFDS dataset.

  Args:
    request: `name` is TFDS's; `path`, if any, the TFDS data folder; the keys default to "image"
      and "label".

  Returns:
    Both splits and the label feature's class names.

  Raises:
    UserError: if TFDS is not installed, or the dataset, a split or a feature does not exist, or it
      can be neither found on disk nor downloaded, or its files are corrupt.
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
          f"config.data.{field}={key!r}: tfds {request.name!r} has the features"
          f" {', '.join(builder.info.features)}"
      )
  missing = [split for split in ("train", "test") if split not in builder.info.splits]
  if missing:
    raise UserError(
        f"config.data.name={request.name!r} has no {missing[0]!r} split at tfds, only"
        f" {', '.join(builder.info.splits)}"
    )
  names = getattr(builder.info.features[label_key], "names", None)
  if not names:
    raise UserError(f"config.data.label_key={label_key!r}: this tfds feature is no class label")
  splits = []
  for split in ("train", "test"):
    try:
      splits.append(_stack(_records(tensorflow_datasets, builder, split), image_key, label_key))
    except ImportError as error:
      raise UserError(_NEEDS_EXTRA.format(error.name)) from None
    except (OSError, RuntimeError, TypeError, ValueError) as error:
      raise UserError(
          f"tfds {request.name!r} cannot be read ({first_line(error)}): remove it from the"
          " TFDS data folder, to prepare it again"
      ) from None
  return Contents(*splits, tuple(names))


def _prepared(tensorflow_datasets, request: Request):
  """Returns a builder whose files are on disk, downloading and preparing them if need be."""
  options = {"data_dir": request.path or None}
  try:
    builder = tensorflow_datasets.builder(request.name, **options)
    if builder.is_prepared():
      return builder
    builder = tensorflow_datasets.builder(request.name, file_format="array_record", **options)
  except ValueError as error:
    reason = first_line(error)
    raise UserError(f"config.data.name={request.name!r}: tfds says {reason!r}") from None
  _check_network(request.name, builder)
  try:
    builder.download_and_prepare()
  except ImportError as error:
    raise UserError(_NEEDS_EXTRA.format(error.name) + " (it prepares the dataset)") from None
  except OSError as error:
    raise unreachable(f"tfds {request.name!r}", error) from None
  return builder


def _check_network(name: str, builder) -> None:
  """Asks for one of the dataset's addresses: TFDS itself retries for minutes."""
  for url in list(builder.url_infos or ())[:1]:
    import requests  # TFDS's own client.

    try:
      requests.head(url, timeout=CONNECT_SECONDS)
    except requests.RequestException as error:
      raise unreachable(f"tfds {name!r}", error) from None


def _records(tensorflow_datasets, builder, split: str) -> Iterable[dict[str, Any]]:
  """Iterates over decoded records in the order of the files."""
  try:
    return iter(builder.as_data_source(split=split))
  except NotImplementedError:  # Prepared as TFRecord, by another program.
    return tensorflow_datasets.as_numpy(builder.as_dataset(split=split, shuffle_files=False))


def _stack(records: Iterable[dict[str, Any]], image_key: str, label_key: str) -> ImageSplit:
  """Collects records into arrays; images of several sizes are an error."""
  pairs = [(record[image_key], record[label_key]) for record in records]
  shapes = {np.shape(image) for image, _ in pairs}
  if len(shapes) != 1:
    raise ValueError(f"images of {len(shapes)} shapes where one is needed: {sorted(shapes)[:3]}")
  return ImageSplit(
      np.stack([image for image, _ in pairs]).astype(np.uint8, casting="safe"),
      np.array([label for _, label in pairs]),
  )
