"""Each source on small files, and every refusal in one clear line."""

import io
import sys
import tarfile
import types

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hamu_jax.data import SOURCES, cifar10_binary, load
from hamu_jax.data.dataset import balanced_subset
from hamu_jax.data.encoded import resized
from hamu_jax.errors import UserError

RNG = np.random.default_rng(0)
NAMES = ["cat", "dog", "eel"]


def _images(count, shape=(4, 5, 3)):
  return RNG.integers(0, 256, (count, *shape), dtype=np.uint8)


TRAIN, TEST = _images(12), _images(6)
TRAIN_LABELS, TEST_LABELS = np.arange(12) % 3, np.arange(6) % 3


def _png(image):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "png")
  return buffer.getvalue()


def _write_parquet(path, images, labels, image_key="img", names=NAMES):
  """A file as `datasets` writes it: encoded images, class names in the metadata."""
  features = datasets.Features({image_key: datasets.Image(), "label": datasets.ClassLabel(names=names)})
  indices = {image_key: [{"bytes": _png(image), "path": None} for image in images], "label": labels}
  path.parent.mkdir(parents=True, exist_ok=True)
  datasets.Dataset.from_dict(indices, features=features).to_parquet(str(path))


def _folder(path, **options):
  _write_parquet(path / "train.parquet", TRAIN, TRAIN_LABELS, **options)
  _write_parquet(path / "test.parquet", TEST, TEST_LABELS, **options)
  return str(path)


def _refused(source, message, **options):
  with pytest.raises(UserError, match=message) as error:
    load(source, **options)
  assert "\n" not in str(error.value)


def _assert_is_the_sample(dataset):
  np.testing.assert_array_equal(dataset.train.images, TRAIN)
  np.testing.assert_array_equal(dataset.train.labels, TRAIN_LABELS)
  np.testing.assert_array_equal(dataset.test.images, TEST)
  np.testing.assert_array_equal(dataset.test.labels, TEST_LABELS)
  assert dataset.class_names == tuple(NAMES)
  assert dataset.train.images.dtype == np.uint8 and dataset.train.labels.dtype == np.int32


# --- what every source goes through ---


def test_unknown_source_names_the_nearest_and_all():
  _refused("parkuet", r"config.data.source='parkuet' \(did you mean 'parquet'\?\)")
  _refused("?", "choose one of digits, tfds, huggingface, parquet, cifar10_binary")


def test_digits_are_all_there_in_a_stratified_split():
  from sklearn.datasets import load_digits

  dataset = load("digits")
  counts, labels = load_digits(return_X_y=True)
  both = np.concatenate([dataset.train.images, dataset.test.images])
  assert both.shape == (1797, 8, 8, 1) and both.dtype == np.uint8
  ink = np.rint(both.reshape(1797, 64) * (16 / 255))
  order, expected_order = np.lexsort(ink.T), np.lexsort(counts.T)
  np.testing.assert_array_equal(ink[order], counts[expected_order])
  np.testing.assert_array_equal(
    np.concatenate([dataset.train.labels, dataset.test.labels])[order], labels[expected_order]
  )
  assert both.min() == 0 and both.max() == 255
  share = np.bincount(dataset.test.labels) / np.bincount(labels)
  np.testing.assert_allclose(share, 0.2, atol=0.01)
  assert dataset.class_names == tuple("0123456789")
  _refused("digits", "no meaning for the embedded digits", path="somewhere")


def test_images_in_memory_are_resized_too():
  small, large = load("digits", test_size=20), load("digits", test_size=20, image_size=32)
  assert large.train.images.shape == (1438, 32, 32, 1)
  np.testing.assert_array_equal(large.test.images, resized(small.test.images, 32))
  assert large.fingerprint != small.fingerprint


def test_fingerprint_changes_with_anything_that_training_sees(tmp_path):
  def of(name, images=TRAIN, labels=TRAIN_LABELS, names=NAMES):
    _write_parquet(tmp_path / name / "train.parquet", images, labels, names=names)
    _write_parquet(tmp_path / name / "test.parquet", TEST, TEST_LABELS, names=names)
    return load("parquet", path=str(tmp_path / name)).fingerprint

  one_pixel = TRAIN.copy()
  one_pixel[3, 1, 2, 0] ^= 1
  different = [
    of("same"),
    of("pixel", images=one_pixel),
    of("label", labels=(np.arange(12) + 1) % 3),
    of("names", names=["cat", "dog", "fox"]),
    load("parquet", path=str(tmp_path / "same"), train_size=6).fingerprint,
  ]
  assert of("again") == different[0]
  assert len(set(different)) == len(different)


def test_subset_is_balanced_nested_and_seeded():
  labels = np.repeat(np.arange(4), [50, 50, 50, 3])
  small, large, other = (balanced_subset(labels, *args) for args in ((8, 1), (41, 1), (8, 2)))
  np.testing.assert_array_equal(np.bincount(labels[small]), [2, 2, 2, 2])
  np.testing.assert_array_equal(np.bincount(labels[large]), [13, 13, 12, 3])
  assert set(small) < set(large) and set(small) != set(other)
  assert (np.diff(large) > 0).all()
  np.testing.assert_array_equal(balanced_subset(labels, 153, 1), np.arange(153))


def test_sizes_choose_rows_in_order_and_may_not_exceed_the_split(tmp_path):
  path = _folder(tmp_path)
  dataset = load("parquet", path=path, train_size=7, test_size=6, seed=4)
  indices = balanced_subset(TRAIN_LABELS, 7, 4)
  np.testing.assert_array_equal(dataset.train.images, TRAIN[indices])
  np.testing.assert_array_equal(dataset.train.labels, TRAIN_LABELS[indices])
  np.testing.assert_array_equal(dataset.test.images, TEST)
  _refused("parquet", "config.data.train_size=13: choose 1..12", path=path, train_size=13)
  _refused("parquet", "config.data.test_size=-1: choose 1..6", path=path, test_size=-1)


# --- parquet ---


@pytest.mark.parametrize(
  "train, test",
  [
    ("train.parquet", "test.parquet"),
    ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
    ("plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"),
  ],
)
@pytest.mark.parametrize("keys", [{}, {"image_key": "img", "label_key": "label"}])
def test_parquet_reads_the_layouts_of_the_hub(tmp_path, train, test, keys):
  _write_parquet(tmp_path / train, TRAIN, TRAIN_LABELS)
  _write_parquet(tmp_path / test, TEST, TEST_LABELS)
  _assert_is_the_sample(load("parquet", path=str(tmp_path), **keys))


def test_parquet_joins_shards_in_order(tmp_path):
  _write_parquet(tmp_path / "train-00000-of-00002.parquet", TRAIN[:5], TRAIN_LABELS[:5])
  _write_parquet(tmp_path / "train-00001-of-00002.parquet", TRAIN[5:], TRAIN_LABELS[5:])
  _write_parquet(tmp_path / "test-00000-of-00001.parquet", TEST, TEST_LABELS)
  _assert_is_the_sample(load("parquet", path=str(tmp_path)))


def _write_plain(folder, images, labels, **columns):
  """Parquet without the metadata of `datasets`."""
  table = pa.table({"image": images, "label": labels, **columns})
  for split in ("train", "test"):
    pq.write_table(table, folder / f"{split}.parquet")
  return str(folder)


def test_parquet_without_metadata_numbers_its_classes(tmp_path):
  labels = pa.array(np.array(TRAIN_LABELS, np.uint8))
  path = _write_plain(tmp_path, [_png(image) for image in TRAIN], labels)
  dataset = load("parquet", path=path)
  np.testing.assert_array_equal(dataset.train.images, TRAIN)
  assert dataset.class_names == ("0", "1", "2")


def test_images_are_grey_only_if_all_are(tmp_path):
  grey = _images(3, (4, 5))
  encoded = [_png(image) for image in grey]
  path = _write_plain(tmp_path, encoded, [0, 1, 2])
  np.testing.assert_array_equal(load("parquet", path=path).train.images, grey[..., None])
  path = _write_plain(tmp_path, [*encoded[:2], _png(TRAIN[0])], [0, 1, 2])
  images = load("parquet", path=path).train.images
  np.testing.assert_array_equal(images[0], np.stack([grey[0]] * 3, -1))
  np.testing.assert_array_equal(images[2], TRAIN[0])


def test_parquet_refuses_what_is_not_there(tmp_path):
  _refused("parquet", "config.data.path='' is not a folder", path="")
  _refused("parquet", "is not a folder", path=str(tmp_path / "missing"))
  _refused("parquet", r"holds no train\*.parquet, .*\(none\)", path=str(tmp_path))
  for name in ("a", "b"):
    _write_parquet(tmp_path / name / "train.parquet", TRAIN, TRAIN_LABELS)
  _refused("parquet", r"not exactly one of its subfolders does \(a, b\)", path=str(tmp_path))
  _refused("parquet", r"holds no test.parquet", path=str(tmp_path / "a"))


def test_parquet_refuses_missing_columns_and_lists_them(tmp_path):
  path = _folder(tmp_path, image_key="picture")
  message = r"config.data.image_key='img' is not a column: choose from picture \(struct.*label \(int64"
  _refused("parquet", message, path=path, image_key="img")
  _refused("parquet", "config.data.label_key='fine' is not a column", path=path, label_key="fine")
  _refused(
    "parquet",
    "image_key='label' holds int64 where encoded images \\(bytes\\) are needed",
    path=path,
    image_key="label",
  )
  _refused(
    "parquet",
    "label_key='picture' holds struct.*where class numbers .*are needed",
    path=path,
    label_key="picture",
  )


def test_parquet_refuses_a_choice_of_columns(tmp_path):
  encoded = [_png(image) for image in TRAIN]
  path = _write_plain(tmp_path, encoded, TRAIN_LABELS, index=np.arange(12), large=encoded)
  message = r"config.data.image_key: 2 columns fit, name one of image .*, large"
  _refused("parquet", message, path=path, label_key="label")
  message = r"config.data.label_key: 2 columns fit, name one of .*label .*index"
  _refused("parquet", message, path=path, image_key="image")
  path = _write_plain(tmp_path, encoded, np.arange(12) * 1000)
  _refused("parquet", "holds 11000 but only 12 rows, so it is not a class number", path=path)


@pytest.mark.parametrize(
  "labels, message",
  [
    ([0, 3], "example 1 has label 3, outside the 3 classes 0..2 .1 such"),
    ([-1, 1], "example 0 has label -1"),
    ([0, 2**32 + 1], "example 1 has label 4294967297"),
  ],
)
def test_labels_outside_the_classes_are_refused(tmp_path, labels, message):
  path = tmp_path / _folder(tmp_path)
  table = pq.read_table(path / "test.parquet").slice(0, 2)
  column = pa.array(labels, pa.int64())
  pq.write_table(table.set_column(1, table.schema.field("label"), column), path / "test.parquet")
  _refused("parquet", "test: " + message, path=str(path))


def test_missing_labels_are_refused(tmp_path):
  path = _write_plain(tmp_path, [_png(TRAIN[0])] * 2, [0, None])
  _refused("parquet", "1 of 2 train examples have no label; choose", path=path)


@pytest.mark.parametrize("damage", ["truncate", "overwrite"])
def test_corrupt_parquet_is_refused(tmp_path, damage):
  path = _folder(tmp_path)
  file = tmp_path / "train.parquet"
  data = file.read_bytes()
  file.write_bytes(data[: len(data) // 2] if damage == "truncate" else b"not a parquet file")
  _refused("parquet", "train.parquet': cannot be read as a parquet file", path=path)


@pytest.mark.parametrize(
  "value, message",
  [
    (_png(TRAIN[0])[:60], "train image 1 cannot be decoded"),
    (b"no image", "train image 1 cannot be decoded .not of a format that is read: JPEG, PNG"),
    (None, "train image 1 cannot be decoded"),
    (_png(np.zeros((4, 5), np.uint16)), "more than 8 bits a channel"),
    (_png(_images(1, (6, 5, 3))[0]), "train images have 2 shapes, one is needed"),
  ],
)
def test_bad_images_are_refused(tmp_path, value, message):
  path = _write_plain(tmp_path, [_png(TRAIN[0]), value], [0, 1])
  _refused("parquet", message, path=path)


def test_splits_of_different_shapes_are_refused(tmp_path):
  _write_parquet(tmp_path / "train.parquet", TRAIN, TRAIN_LABELS)
  _write_parquet(tmp_path / "test.parquet", _images(2, (4, 4, 3)), [0, 1])
  message = r"train images are \(4, 5, 3\) but test images are \(4, 4, 3\)"
  _refused("parquet", message, path=str(tmp_path))


def test_empty_splits_are_refused(tmp_path):
  path = _folder(tmp_path)
  table = pq.read_table(tmp_path / "test.parquet")
  pq.write_table(table.slice(0, 0), tmp_path / "test.parquet")
  _refused("parquet", "test: the split is empty", path=path)


# --- the hub ---


def _hub(monkeypatch, splits, info=None):
  """Replaces the hub by `splits`, and what it answers about the dataset by `info`."""

  def load_dataset(name, subset, cache_dir):
    del name, cache_dir
    if isinstance(splits, Exception):
      raise splits
    # The configurations of a hub dataset, where it has several.
    return splits[subset] if subset else splits

  def dataset_info(self, name, timeout):
    del self, name
    assert timeout <= 10
    if info is not None:
      raise info

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)


def test_hub_dataset_is_read_by_its_features(monkeypatch, tmp_path):
  path = _folder(tmp_path)
  files = {split: f"{path}/{split}.parquet" for split in ("train", "test")}
  splits = datasets.DatasetDict(
    {split: datasets.Dataset.from_parquet(file, cache_dir=path) for split, file in files.items()}
  )
  _hub(monkeypatch, splits)
  dataset = load("huggingface", name="someone/animals")
  _assert_is_the_sample(dataset)
  assert dataset.name == "someone/animals"
  splits = datasets.DatasetDict(train=splits["train"], validation=splits["test"])
  _hub(monkeypatch, splits)
  message = "has no 'test' split on the hub, only train, validation; choose one with config.data.test_split"
  _refused("huggingface", message, name="a/b")


def test_no_network_names_the_ways_out():
  # conftest switches the hub off.
  message = (
    "cannot download 'uoft-cs/cifar10' from the Hugging Face hub .*offline mode.*config.data.path"
    ".*--config=hamu_jax:digits_hamu"
  )
  _refused("huggingface", message, name="uoft-cs/cifar10")


def test_unreachable_hub_falls_back_to_the_cache_at_once(monkeypatch, tmp_path):
  seen = []
  _hub(monkeypatch, None, info=OSError("no route"))

  def load_dataset(name, subset, cache_dir):
    assert subset is None
    seen.append((datasets.config.HF_HUB_OFFLINE, cache_dir))
    raise ConnectionError(f"{name} is not cached")

  monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  _refused("huggingface", r"cannot download .*\(no route\)", name="a/b", path=str(tmp_path))
  assert seen == [(True, str(tmp_path))]
  assert datasets.config.HF_HUB_OFFLINE is False


def test_refusals_of_the_hub(monkeypatch):
  gated = datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub.")
  _hub(monkeypatch, gated)
  message = "unknown on the .*private or gated .*is a gated.*hf auth login"
  _refused("huggingface", message, name="a/b")
  _hub(monkeypatch, RuntimeError("Dataset scripts are no longer supported"))
  _refused("huggingface", "cannot load 'a/b' .*Dataset scripts", name="a/b")
  _hub(monkeypatch, ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']"))
  message = r"config.data.subset='' \(Config name is missing. Please pick one among: \['a', 'b'\]"
  _refused("huggingface", message, name="a/b")
  _hub(monkeypatch, ConnectionResetError("reset by peer"))
  _refused("huggingface", "cannot download .*reset by peer", name="a/b")
  _hub(monkeypatch, None, huggingface_hub.errors.HFValidationError("no repo id"))
  _refused("huggingface", "config.data.name='a b': unknown on the .*no repo id", name="a b")


# --- TensorFlow Datasets ---


def _fake_tfds(records, *, names=NAMES, prepared=True, file_format="array_record", error=None, urls=None):
  """A module with the part of the TFDS interface that is used."""
  feature = types.SimpleNamespace(names=names)
  calls = []

  class Builder:
    info = types.SimpleNamespace(
      features={"image": None, "label": feature},
      splits={split: None for split in records},
    )
    url_infos = urls and dict.fromkeys(urls)

    def is_prepared(self):
      return prepared

    def download_and_prepare(self):
      calls.append("prepare")
      if error:
        raise error

    def as_data_source(self, split, decoders):
      assert decoders == {"image": "encoded"}
      if file_format == "tfrecord":
        raise NotImplementedError("Random access data source for file format TFRECORD")
      return records[split]

    def as_dataset(self, split, decoders, shuffle_files):
      assert decoders == {"image": "encoded"} and not shuffle_files
      return ("tensors", records[split])

  def builder(name, **options):
    calls.append((name, options))
    if name == "cifar11":
      raise ValueError("Dataset cifar11 not found.\nAvailable datasets:\n- many")
    return Builder()

  module = types.ModuleType("tensorflow_datasets")
  module.builder, module.as_numpy, module.calls = builder, lambda dataset: dataset[1], calls
  module.decode = types.SimpleNamespace(SkipDecoding=lambda: "encoded")
  return module


def _records(images, labels, **names):
  """What TFDS gives, told not to decode; `names` are further features of bytes."""
  columns = {"image": [_png(image) for image in images], "label": labels, **names}
  return [dict(zip(columns, index, strict=True)) for index in zip(*columns.values(), strict=True)]


RECORDS = {"train": _records(TRAIN, TRAIN_LABELS), "test": _records(TEST, TEST_LABELS)}


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
@pytest.mark.parametrize("prepared", [True, False])
def test_tfds_reads_both_formats_and_prepares_array_records(monkeypatch, file_format, prepared):
  module = _fake_tfds(RECORDS, file_format=file_format, prepared=prepared)
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
  _assert_is_the_sample(load("tfds", name="animals", path="folder"))
  expected = [("animals", {"data_dir": "folder"})]
  if not prepared:
    expected += [("animals", {"data_dir": "folder", "file_format": "array_record"}), "prepare"]
  assert module.calls == expected


@pytest.mark.parametrize(
  "options, request_options, message",
  [
    ({}, {"image_key": "img"}, "image_key='img': tfds .* has no such feature; choose from image, label"),
    ({}, {"label_key": "fine"}, "config.data.label_key='fine': tfds"),
    ({"names": None}, {}, "this tfds feature is not a class label"),
    ({}, {"name": "cifar11"}, "config.data.name='cifar11': tfds says 'Dataset cifar11 not"),
    (
      {"prepared": False, "error": ConnectionError("no route")},
      {},
      "cannot download tfds 'animals' .no route.*config.data.path.*digits_hamu",
    ),
    (
      {"prepared": False, "error": ModuleNotFoundError("none", name="tensorflow")},
      {},
      r"needs tensorflow: pip install -e '.\[tensorflow\]' .it prepares",
    ),
  ],
)
def test_tfds_refusals(monkeypatch, options, request_options, message):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", _fake_tfds(RECORDS, **options))
  _refused("tfds", message, **{"name": "animals", **request_options})


def test_tfds_refuses_missing_splits_and_unequal_images(monkeypatch):
  module = _fake_tfds({"train": RECORDS["train"], "validation": []})
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
  _refused("tfds", "has no 'test' split at tfds, only train, validation", name="animals")
  uneven = _records([TRAIN[0], _images(1, (8, 8, 3))[0]], [0, 1])
  module = _fake_tfds({"train": uneven, "test": RECORDS["test"]})
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
  _refused("tfds", "train images have 2 shapes, one is needed", name="animals")


def test_tfds_names_the_extra_that_brings_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  _refused("tfds", r"needs tensorflow_datasets: pip install -e '.\[tensorflow\]'", name="cifar10")


def test_tfds_asks_for_the_network_before_it_prepares(monkeypatch):
  class ConnectionFailed(OSError):
    pass

  def head(url, timeout):
    assert url == "https://example.org/data.tar.gz" and timeout <= 10
    raise ConnectionFailed("no route")

  requests = types.SimpleNamespace(head=head, RequestException=ConnectionFailed)
  module = _fake_tfds(RECORDS, prepared=False, urls=["https://example.org/data.tar.gz"])
  monkeypatch.setitem(sys.modules, "requests", requests)
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
  _refused("tfds", "cannot download tfds 'animals' .no route", name="animals")
  assert "prepare" not in module.calls


# --- the binary archive of CIFAR-10 ---

BINARY_IMAGES = RNG.integers(0, 256, (6, 3, 32, 32, 3), dtype=np.uint8)
BINARY_LABELS = RNG.integers(0, 10, (6, 3), dtype=np.uint8)
BINARY_NAMES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]


def _binary_files():
  planes = BINARY_IMAGES.transpose(0, 1, 4, 2, 3).reshape(6, 3, -1)
  records = np.concatenate([BINARY_LABELS[..., None], planes], axis=2)
  return {name: records[i].tobytes() for i, name in enumerate(BINARY_NAMES)}


def _write_folder(folder, files):
  folder.mkdir(parents=True, exist_ok=True)
  for name, data in files.items():
    (folder / name).write_bytes(data)
  return folder


def _write_archive(path, files, folder="cifar-10-batches-bin"):
  with tarfile.open(path, "w:gz") as archive:
    for name, data in files.items():
      member = tarfile.TarInfo(f"{folder}/{name}")
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))
  return path


def _assert_is_the_binary_sample(dataset):
  np.testing.assert_array_equal(dataset.train.images, BINARY_IMAGES[:5].reshape(-1, 32, 32, 3))
  np.testing.assert_array_equal(dataset.train.labels, BINARY_LABELS[:5].reshape(-1))
  np.testing.assert_array_equal(dataset.test.images, BINARY_IMAGES[5])
  np.testing.assert_array_equal(dataset.test.labels, BINARY_LABELS[5])
  assert dataset.class_names[0] == "airplane" and len(dataset.class_names) == 10


def test_binary_archive_and_folders(tmp_path):
  files = _binary_files()
  archive = _write_archive(tmp_path / cifar10_binary.ARCHIVE, files)
  folder = _write_folder(tmp_path / "unpacked" / "cifar-10-batches-bin", files)
  for path in (archive, archive.parent, folder, folder.parent):
    _assert_is_the_binary_sample(load("cifar10_binary", path=str(path)))


def test_python_version_is_refused_with_the_reason(tmp_path):
  files = {"data_batch_1": b"anything", "batches.meta": b""}
  archive = _write_archive(tmp_path / "cifar-10-python.tar.gz", files, "cifar-10-batches-py")
  folder = _write_folder(tmp_path / "cifar-10-batches-py", files)
  for path in (archive, folder):
    message = "python version of CIFAR-10: a pickle, which can run .*cifar-10-binary.tar.gz"
    _refused("cifar10_binary", message, path=str(path))


def test_binary_refuses_missing_and_corrupt_files(tmp_path):
  _refused("cifar10_binary", "does not exist", path=str(tmp_path / "missing"))
  _refused("cifar10_binary", "config.data.path='' does not exist", path="")
  _refused("cifar10_binary", "holds neither data_batch_1.bin nor", path=str(tmp_path))

  files = _binary_files()
  archive = _write_archive(tmp_path / "whole.tar.gz", files)
  cut = tmp_path / "cut.tar.gz"
  cut.write_bytes(archive.read_bytes()[:-5000])
  _refused("cifar10_binary", "cannot be read as an archive", path=str(cut))
  cut.write_bytes(b"no archive at all")
  _refused("cifar10_binary", "cannot be read as an archive", path=str(cut))

  def refused(message, **changes):
    changed = {name: data for name, data in (files | changes).items() if data is not None}
    folder = tmp_path / message[:12]
    _refused("cifar10_binary", message, path=str(_write_folder(folder, changed)))

  refused("data_batch_3.bin is missing or empty", **{"data_batch_3.bin": None})
  refused("data_batch_2.bin is missing or empty", **{"data_batch_2.bin": b""})
  short = files["test_batch.bin"][:-1]
  refused("test_batch.bin is 9218 bytes, not a multiple of 3073", **{"test_batch.bin": short})
  refused("is truncated: its batches differ", **{"test_batch.bin": files["test_batch.bin"][:3073]})
  mislabelled = b"\x0a" + files["data_batch_1.bin"][1:]
  refused("train: example 0 has label 10, outside the 10", **{"data_batch_1.bin": mislabelled})


def test_every_source_is_exercised_here():
  assert set(SOURCES) == {"digits", "tfds", "huggingface", "parquet", "cifar10_binary"}
