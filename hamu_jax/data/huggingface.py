"""Images in the Hugging Face layout: a dataset of the hub, or a local folder of parquet files.

Both are Arrow tables with one column of encoded images (struct {bytes, path}, or plain bytes) and
one of classes. The class names are in the features, which a file keeps in its metadata.
"""

import contextlib
import glob
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hamu_jax import outside
from hamu_jax.data import class_labels, shards
from hamu_jax.data.dataset import Contents, ImageSplit, Request
from hamu_jax.data.encoded import IMAGE_BYTES, EncodedImages
from hamu_jax.errors import CONNECT_SECONDS, UserError, first_line, unreachable

Features = dict[str, dict[str, Any]]  # {column: its Hugging Face feature {"_type": ..., ...}}


def read_folder(request: Request) -> Contents:
  """Reads the parquet files of two splits from a folder or its one subfolder that has them.

  Args:
    request: `path` is the folder. A snapshot of a hub repository has the files in `data/` or in
      a folder named after a configuration, which `subset` chooses. For streaming, the files are
      converted once to Arrow in the cache of `datasets`, because parquet cannot be read by rows.

  Returns:
    Both splits.

  Raises:
    UserError: for a missing path, file or column, or a corrupt file or image.
  """
  import pyarrow as pa

  folder = _parquet_folder(request)
  splits = shards.by_split(folder.glob("*.parquet"))
  tables, features = {}, {}
  for split in dict.fromkeys((request.train_split, request.test_split)):
    if split not in splits:
      raise UserError(
        f"config.data.path='{folder}' holds no {split}.parquet or shards of it, but {', '.join(splits)};"
        f" choose one with {request.split_field(split)}"
      )
    files = list(splits[split])
    try:
      tables[split] = (_mapped if request.stream else read_parquet)(files)
    except pa.ArrowException as error:
      raise UserError(
        f"config.data.path='{folder}': {split}*.parquet have different columns ({first_line(error)}); keep"
        " the files of one dataset there"
      ) from None
    features[split] = _features(files)
  return _contents(tables, features, request, (folder,))


def read_parquet(files: list[pathlib.Path]):
  """Reads files into memory, as one table.

  Args:
    files: parquet files that have one schema.

  Returns:
    A `pyarrow.Table`.

  Raises:
    UserError: for a corrupt file.
    pyarrow.ArrowException: if the files' schemas differ.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq

  return pa.concat_tables(_opened(pq.read_table, file) for file in files)


def _mapped(files: list[pathlib.Path]):
  """Converts files to Arrow, with one of them in memory at a time, and maps the result as one table."""
  import datasets
  import pyarrow as pa
  import pyarrow.parquet as pq

  pa.unify_schemas([_opened(pq.read_schema, file) for file in files])
  try:
    return datasets.Dataset.from_parquet([str(file) for file in files]).with_format("arrow")[:]
  except (datasets.exceptions.DatasetsError, OSError) as error:
    raise UserError(
      f"config.data.path: '{files[0]}' and those beside it cannot be converted to Arrow"
      f" ({first_line(error.__cause__ or error)})"
    ) from None


def _opened(read: Callable, file: pathlib.Path):
  with outside.read_of(f"config.data.path: '{file}'", "a parquet file", "download it again"):
    return read(file)


def _features(files: list[pathlib.Path]) -> Features:
  """Reads the Hugging Face features in the metadata of a split's files, which must be the same in all."""
  import pyarrow.parquet as pq

  found = []
  for file in files:
    metadata = _opened(pq.read_schema, file).metadata or {}
    where, remedy = f"config.data.path: '{file}'", "download it again"
    with outside.read_of(where, "a parquet file with metadata of Hugging Face", remedy):
      features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
      if not all(isinstance(feature, dict) for feature in features.values()):
        raise ValueError("its features are not objects")
    found.append(features)
  if different := [file for file, features in zip(files, found, strict=True) if features != found[0]]:
    raise UserError(
      f"config.data.path: '{different[0]}' describes its columns or classes otherwise than '{files[0]}'; keep"
      " the files of one dataset there"
    )
  return found[0]


def _parquet_folder(request: Request) -> pathlib.Path:
  """Finds the folder that holds the files of the training split."""
  path, subset = request.path, request.subset
  files = f"{glob.escape(request.train_split)}*.parquet"
  folder = pathlib.Path(path, subset)
  if not path or not folder.is_dir():
    raise UserError(
      f"config.data.path={path!r}{f', config.data.subset={subset!r}' if subset else ''} is not a"
      f" folder: give the one with {request.train_split}*.parquet and {request.test_split}*.parquet"
    )
  if any(folder.glob(files)):
    return folder
  found = sorted({file.parent for file in folder.glob(f"*/{files}")})
  if len(found) != 1:
    names = ", ".join(child.name for child in found) or "none"
    raise UserError(
      f"config.data.path='{folder}' holds no {files}, and not exactly one of its subfolders"
      f" does ({names}); choose one with config.data.subset, or the split with config.data.train_split"
    )
  return found[0]


class UnknownSubset(UserError):
  """The hub has the dataset, but no configuration of that name."""


class Hub:
  """One dataset of the Hugging Face hub or, when the hub cannot be reached, of its local cache."""

  def __init__(
    self,
    name: str,
    cache: str = "",
    *,
    example: str = "CIFAR-10 is 'uoft-cs/cifar10'",
    no_network: Callable[[str, Exception], UserError] = unreachable,
  ):
    """Asks the hub once whether the dataset exists, because `load_dataset` itself retries for minutes.

    Args:
      name: the dataset's hub id.
      cache: the cache folder; empty for the default one.
      example: a name that exists, for the error message.
      no_network: (what was to be downloaded, the error) -> the `UserError` of a failed download.

    Raises:
      UserError: if the hub answers that there is no such dataset.
    """
    import huggingface_hub
    from huggingface_hub import errors

    self.name = name
    self._cache, self._example, self._no_network = cache, example, no_network
    self._network_error = None
    try:
      huggingface_hub.HfApi().dataset_info(name, timeout=CONNECT_SECONDS)
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
      raise self._no_access(error) from None
    except (OSError, errors.HTTPError) as error:
      self._network_error = error

  def splits(self, subset: str, field: str = "config.data.subset"):
    """Loads all splits of one configuration, memory-mapped.

    Args:
      subset: the configuration; empty for the default or only one.
      field: the config field that names it, for the error message.

    Returns:
      A `datasets.DatasetDict`.

    Raises:
      UserError: if the dataset can be neither downloaded nor found in the cache, is gated, has no such
        configuration (`UnknownSubset`), or needs code of its own to load.
    """
    import datasets
    from huggingface_hub import errors

    what = f"{self.name!r} from the Hugging Face hub"
    try:
      with self._offline():
        return datasets.load_dataset(self.name, subset or None, cache_dir=self._cache or None)
    except datasets.exceptions.DatasetNotFoundError as error:
      raise self._no_access(error) from None
    except (OSError, errors.HTTPError) as error:
      raise self._no_network(what, error) from None
    except (datasets.exceptions.DatasetsError, RuntimeError, ValueError) as error:
      reason = " ".join(str(error).split())
      unknown = re.match(r"BuilderConfig \S+ not found", reason)
      raise (UnknownSubset if unknown else UserError)(
        f"config.data.name: cannot load {what} with {field}={subset!r} ({reason[:400]}); check the name and"
        " the configuration on the dataset's page"
      ) from None

  @contextlib.contextmanager
  def _offline(self):
    """Restricts `datasets` to its cache if the hub cannot be reached; an empty cache raises that error."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or self._network_error is not None
    try:
      yield
    except OSError as error:
      raise self._network_error or error from None
    finally:
      datasets.config.HF_HUB_OFFLINE = before

  def _no_access(self, error: Exception) -> UserError:
    return UserError(
      f"config.data.name={self.name!r}: unknown on the Hugging Face hub, private or gated"
      f" ({first_line(error)}); check the name ({self._example}), or accept the dataset's terms"
      " on its page and log in with `hf auth login`"
    )


def read_hub(request: Request) -> Contents:
  """Reads two splits of a dataset of the Hugging Face hub, or of its local cache.

  Args:
    request: `name` is the hub id, `subset` its configuration and `path`, if not empty, the cache folder.

  Returns:
    Both splits.

  Raises:
    UserError: if the hub cannot be reached and the cache does not have the dataset, or if the dataset is
      gated or unknown, has no such splits or columns, or needs code of its own to load.
  """
  splits = Hub(request.name, request.path).splits(request.subset)
  wanted = dict.fromkeys((request.train_split, request.test_split))
  missing = [split for split in wanted if split not in splits]
  if missing:
    raise UserError(
      f"config.data.name={request.name!r} has no {missing[0]!r} split on the hub, only"
      f" {', '.join(splits)}; choose one with {request.split_field(missing[0])}"
    )
  import datasets
  from huggingface_hub import constants

  # Memory-mapped: nothing is copied.
  tables = {split: splits[split].with_format("arrow")[:] for split in wanted}
  features = {split: splits[split].features.to_dict() for split in wanted}
  caches = (request.path or datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
  return _contents(tables, features, request, tuple(map(pathlib.Path, caches)))


def _contents(
  tables: dict[str, Any], features: dict[str, Features], request: Request, folders: tuple[pathlib.Path, ...]
) -> Contents:
  """Decodes the Arrow tables of all splits; images that they name lie in one of `folders`."""
  import pyarrow.types as types

  def holds_images(kind):
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind)
    return is_bytes or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)

  schema = tables[request.train_split].schema
  images = _Wanted("image_key", "Image", "encoded images (bytes)", (holds_images,))
  labels = _Wanted("label_key", "ClassLabel", class_labels.KINDS, (types.is_integer, class_labels.may_hold))
  image_key = _column(schema, features[request.train_split], request.image_key, images)
  label_key = _column(schema, features[request.train_split], request.label_key, labels)
  for split, table in tables.items():
    missing = {image_key, label_key} - set(table.column_names)
    if missing:
      raise UserError(
        f"the {split} table has no column {missing.pop()!r}: config.data.image_key and"
        f" config.data.label_key choose from {', '.join(table.column_names)}"
      )
  numbers, class_names = class_labels.read(
    {split: table.column(label_key) for split, table in tables.items()},
    {split: _class_names(found.get(label_key, {}), split) for split, found in features.items()},
    f"config.data.label_key={label_key!r}",
    whole=request.whole,
  )
  splits = {
    split: ImageSplit(
      EncodedImages(
        _reader(table.column(image_key), folders),
        np.arange(len(table)),
        f"{split} image",
        request.image_size,
      ),
      numbers[split],
    )
    for split, table in tables.items()
  }
  return Contents(
    splits[request.train_split],
    splits[request.test_split],
    class_names,
    train_names=_file_names(tables[request.train_split].column(image_key)),
  )


def _class_names(feature: dict[str, Any], split: str) -> list[str] | None:
  """The class names that the metadata of a column list, None if there are none."""
  names = feature.get("names")
  if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
    raise UserError(f"the metadata of {split} list class names that are no texts; download the dataset again")
  return names or None


def _reader(column, folders: tuple[pathlib.Path, ...]) -> Callable[[int], bytes]:
  """Returns a function that reads one encoded image and leaves the column where it is."""

  def read(row: int) -> bytes:
    value = column[row].as_py()
    if isinstance(value, dict):
      value = value["bytes"] or _file_bytes(value["path"], folders)
    return value

  return read


def _file_bytes(path: str, folders: tuple[pathlib.Path, ...]) -> bytes:
  """Reads a file that a table names. It must lie in one of the folders: the table may be anybody's."""
  for folder in folders:
    root, file = folder.resolve(), (folder / path).resolve()
    if file.is_relative_to(root) and file.is_file():
      if file.stat().st_size > IMAGE_BYTES:
        raise ValueError(f"{path!r} is larger than {IMAGE_BYTES >> 20} MiB")
      return file.read_bytes()
  raise ValueError(f"its file {path!r} is not in the dataset's folder")


def _file_names(column) -> np.ndarray | None:
  """Returns the images' file names, or None if one of them has none."""
  import pyarrow.compute as pc
  import pyarrow.types as types

  if not types.is_struct(column.type) or column.type.get_field_index("path") < 0:
    return None
  names = pc.struct_field(column, "path")
  return None if names.null_count else np.array(names.to_pylist(), np.dtypes.StringDType())


class _Wanted(NamedTuple):
  """What a column must be."""

  field: str  # the field of `config.data` that names it
  feature: str  # its type in the Hugging Face features
  values: str  # its values, in words
  # Whether a `pyarrow.DataType` can hold these values; the last admits all types, those before are preferred.
  fits: tuple[Callable[[Any], bool], ...]


def _column(schema, features: Features, key: str, wanted: _Wanted) -> str:
  """Returns the column that `key` names or, for an empty key, the only column that fits."""
  columns = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)
  if key:
    if key not in schema.names:
      raise UserError(f"config.data.{wanted.field}={key!r} is not a column: choose from {columns}")
    if not wanted.fits[-1](schema.field(key).type):
      raise UserError(
        f"config.data.{wanted.field}={key!r} holds {schema.field(key).type} where {wanted.values} are needed:"
        f" choose from {columns}"
      )
    return key
  found = [name for name in schema.names if features.get(name, {}).get("_type") == wanted.feature]
  for fits in wanted.fits:
    found = found or [name for name in schema.names if fits(schema.field(name).type)]
  if len(found) != 1:
    raise UserError(f"config.data.{wanted.field}: {len(found)} columns fit, name one of {columns}")
  return found[0]
