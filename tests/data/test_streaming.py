"""The published datasets through every source, streamed and whole; streaming's memory."""

import io
import shutil
import sys
import tracemalloc
import types

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hamu_jax.data import load, window
from hamu_jax.data.encoded import EncodedImages, resize
from hamu_jax.errors import UserError


def _mock_hub(monkeypatch, made):
  """Has the hub give these files, for the right configuration only."""

  def load_dataset(name, subset, cache_dir):
    assert (name, subset, cache_dir) == (made.spec.name, made.spec.subset or None, None)
    return datasets.DatasetDict(
      {split: datasets.Dataset.from_parquet(file) for split, file in made.files.items()}
    )

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)


def _mock_tfds(monkeypatch, made, order, *, record_names, file_format="array_record"):
  """Has TFDS give the same records, shuffled as it does when it prepares a dataset."""
  read = []

  class Records(list):
    def __getitem__(self, index):
      read.append(index)
      return super().__getitem__(index)

  def records(split, decoders):
    assert decoders == {"image": "encoded"}
    table = pq.read_table(made.files[split]).to_pylist()
    result = []
    for index in order:
      example = dict(table[index])
      example["image"] = example.pop(made.spec.image_key)["bytes"]
      example["label"] = example.pop(next(iter(made.spec.labels)))
      if record_names:
        key, name = record_names
        example[key] = name(made, split, index).encode()
      result.append(example)
    return Records(result)

  class Builder:
    info = types.SimpleNamespace(
      features={
        "image": None,
        "label": types.SimpleNamespace(names=[str(i) for i in range(1000)]),
      },
      splits=made.files,
    )

    def is_prepared(self):
      return True

    def as_data_source(self, split, decoders):
      if file_format == "tfrecord":
        raise NotImplementedError("Random access data source for file format TFRECORD")
      return records(split, decoders)

    def as_dataset(self, split, decoders, shuffle_files):
      return records(split, decoders)

  module = types.ModuleType("tensorflow_datasets")
  module.builder, module.as_numpy = lambda name, data_dir: Builder(), iter
  module.decode = types.SimpleNamespace(SkipDecoding=lambda: "encoded")
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
  return read


def _expected(made, split, image_size):
  images = made.images[split]
  if image_size:
    images = [np.asarray(resize(Image.fromarray(image), image_size)) for image in images]
  return np.stack(images)


@pytest.mark.parametrize("source", ["parquet", "huggingface"])
@pytest.mark.parametrize("stream", [False, True])
def test_published_schemas_are_read(published, monkeypatch, arrow_cache, source, stream):
  spec, options = published.spec, dict(published.spec.options)
  if source == "huggingface":
    _mock_hub(monkeypatch, published)
  else:
    options["path"] = published.path
  if stream:
    options |= {"stream": True, "image_size": options.get("image_size", spec.sizes[0][0])}
  dataset = load(source, name=spec.name, **options)
  assert isinstance(dataset.train.images, EncodedImages) == stream
  splits = {"train": dataset.train, options.get("test_split", "test"): dataset.test}
  for split, part in splits.items():
    expected = _expected(published, split, options.get("image_size"))
    assert part.images.shape == expected.shape and part.images.dtype == np.uint8
    np.testing.assert_array_equal(part.images[np.arange(12)], expected)
    np.testing.assert_array_equal(part.labels, published.labels[split])
    assert part.labels.dtype == np.int32
  assert len(dataset.class_names) == next(iter(spec.labels.values()))
  np.testing.assert_array_equal(dataset.train_names, published.names["train"])
  np.testing.assert_array_equal(dataset.train_indices, np.arange(12))
  assert dataset.train_total == 12


@pytest.mark.parametrize(
  "published, option, message",
  [
    ("cifar100", "label_key", "label_key: 2 columns fit, name one of .*fine_label .*coarse"),
    (
      "tiny_imagenet",
      "test_split",
      r"holds no test.parquet or shards of it, but train, valid; choose one with config.data.test_split",
    ),
    ("imagenet", "test_split", "test: example 0 has label -1, outside the 1000 classes"),
    ("imagenet", "image_size", "images have 4 shapes, one is needed.*config.data.image_size"),
  ],
  indirect=["published"],
)
def test_published_schemas_say_what_they_need(published, option, message):
  options = {key: value for key, value in published.spec.options.items() if key != option}
  with pytest.raises(UserError, match=message) as error:
    load("parquet", path=published.path, **options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("published", ["svhn"], indirect=True)
def test_a_configuration_is_chosen_among_subfolders(published):
  path = published.path
  shutil.copytree(f"{path}/cropped_digits", f"{path}/full_numbers")
  with pytest.raises(UserError, match=r"\(cropped_digits, full_numbers\); choose one with config"):
    load("parquet", path=path)
  assert load("parquet", path=path, subset="cropped_digits").train_total == 12
  with pytest.raises(UserError, match="config.data.subset='cropped' is not a folder"):
    load("parquet", path=path, subset="cropped")


ORDER = np.random.default_rng(3).permutation(12)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
  "published, record_names",
  [
    ("cifar100", ("id", lambda made, split, index: f"{split}_{index:05d}")),
    ("svhn", None),
    ("imagenet", ("file_name", lambda made, split, index: made.names[split][index])),
  ],
  indirect=["published"],
)
def test_tfds_records_are_traced_to_their_originals(published, monkeypatch, stream, record_names):
  read = _mock_tfds(monkeypatch, published, ORDER, record_names=record_names)
  size = published.spec.options.get("image_size", 32)
  options = {"name": "made", "image_size": size, "stream": stream}
  options["test_split"] = published.spec.options.get("test_split", "")
  dataset = load("tfds", **options)
  del read[:]
  chosen = np.array([4, 9])
  expected = _expected(published, "train", size)[ORDER]
  np.testing.assert_array_equal(dataset.train.images[chosen], expected[chosen])
  assert read == (chosen.tolist() if stream else [])
  np.testing.assert_array_equal(dataset.train.labels, published.labels["train"][ORDER])
  kind = record_names and record_names[0]
  np.testing.assert_array_equal(dataset.train_indices, ORDER if kind == "id" else np.arange(12))
  if kind == "file_name":
    np.testing.assert_array_equal(dataset.train_names, np.array(published.names["train"])[ORDER])
  subset = load("tfds", train_size=5, **options)
  kept = np.flatnonzero(np.isin(dataset.train_indices, subset.train_indices))
  np.testing.assert_array_equal(subset.train_indices, dataset.train_indices[kept])
  np.testing.assert_array_equal(subset.train.images[np.arange(5)], expected[kept])
  assert subset.train_total == 12


@pytest.mark.parametrize("published", ["svhn"], indirect=True)
@pytest.mark.parametrize("name", ["train_{0}", "train_{1}", "other_{0}"])
def test_tfds_names_that_do_not_number_the_rows_leave_their_order(published, monkeypatch, name):
  record_names = ("id", lambda made, split, index: name.format(index, index + 1))
  _mock_tfds(monkeypatch, published, ORDER, record_names=record_names)
  indices = load("tfds", name="made").train_indices
  np.testing.assert_array_equal(indices, ORDER if name == "train_{0}" else np.arange(12))


@pytest.mark.parametrize("published", ["svhn"], indirect=True)
def test_tfrecords_are_read_whole_but_not_streamed(published, monkeypatch):
  options = {"record_names": None, "file_format": "tfrecord"}
  _mock_tfds(monkeypatch, published, ORDER, **options)
  dataset = load("tfds", name="made")
  np.testing.assert_array_equal(dataset.train.images, _expected(published, "train", 0)[ORDER])
  with pytest.raises(UserError, match="^config.data.stream=True: .* prepared as TFRecord"):
    load("tfds", name="made", image_size=32, stream=True)


@pytest.mark.parametrize("published", ["tiny_imagenet"], indirect=True)
def test_a_streamed_subset_is_that_of_the_whole(published, monkeypatch, arrow_cache):
  options = {"train_size": 7, "test_size": 5, "seed": 2, "image_size": 64, "test_split": "valid"}
  whole = load("parquet", path=published.path, **options)
  streamed = load("parquet", path=published.path, stream=True, **options)
  for one, other in ((whole.train, streamed.train), (whole.test, streamed.test)):
    assert isinstance(other.images, EncodedImages)
    np.testing.assert_array_equal(other.images[:], one.images)
    np.testing.assert_array_equal(other.labels, one.labels)
  np.testing.assert_array_equal(streamed.train_indices, whole.train_indices)
  np.testing.assert_array_equal(whole.train.labels, published.labels["train"][whole.train_indices])
  np.testing.assert_array_equal(whole.train_names, np.array(published.names["train"])[whole.train_indices])
  assert whole.train_total == streamed.train_total == 12
  # A window is the batch that the device gathers from.
  indices = np.array([[6, 0], [-1, 6]], np.int32)
  images, local, _ = window(streamed.train.images, indices, capacity=4)
  np.testing.assert_array_equal(images[local[0]], whole.train.images[indices[0]])


@pytest.mark.parametrize("published", ["svhn"], indirect=True)
def test_the_fingerprint_of_a_stream_is_of_its_contents(published, monkeypatch, arrow_cache):
  def of(**options):
    options = {"subset": "cropped_digits", "image_size": 32, "stream": True} | options
    return load("parquet", path=published.path, **options).fingerprint

  def rewrite(cells):
    table = pq.read_table(published.files["train"])
    field = table.schema.field("image")
    table = table.set_column(0, field, pa.array(cells, field.type))
    pq.write_table(table, published.files["train"])

  first, whole = of(), of(stream=False)
  cells = pq.read_table(published.files["train"])["image"].to_pylist()
  changed = [dict(cell) for cell in cells]
  changed[5]["bytes"] = changed[4]["bytes"]
  rewrite(changed)
  different = [first, whole, of(), of(image_size=28), of(train_size=6), of(test_split="extra")]
  assert len(set(different)) == len(different)
  rewrite(cells)
  assert of() == first
  _mock_hub(monkeypatch, published)
  hub = {"name": published.spec.name, "subset": "cropped_digits"}
  assert load("huggingface", image_size=32, stream=True, **hub).fingerprint == first


@pytest.mark.parametrize("published", ["tiny_imagenet"], indirect=True)
def test_streams_are_refused_where_they_cannot_be(published, arrow_cache):
  with pytest.raises(UserError, match="config.data.stream=True needs config.data.image_size"):
    load("parquet", path=published.path, stream=True)
  with pytest.raises(UserError, match="in memory whole; choose .* huggingface, parquet or tfds"):
    load("digits", image_size=8, stream=True)


@pytest.mark.parametrize("damage", ["truncate", "column"])
@pytest.mark.parametrize("published", ["svhn"], indirect=True)
def test_damaged_files_are_refused_before_they_are_converted(published, arrow_cache, damage):
  options = {"path": published.path, "image_size": 32, "stream": True}
  file = published.files["train"]
  if damage == "truncate":
    with open(file, "r+b") as handle:
      handle.truncate(200)
    message = "train-00000-of-00001.parquet': cannot be read as a parquet file"
  else:
    table = pq.read_table(file)
    other = table.set_column(1, "label", pa.array(["text"] * 12))
    pq.write_table(other, file.replace("00000-of-00001", "00001-of-00001"))
    message = r"train\*.parquet have different columns"
  with pytest.raises(UserError, match=message) as error:
    load("parquet", **options)
  assert "\n" not in str(error.value)


def test_a_stream_never_holds_the_dataset(tmp_path, arrow_cache):
  # 48 images of noise, uncompressed, in 12 files: 24 MB.
  features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
  rng = np.random.default_rng(0)
  size = 0
  for shard in range(12):
    cells = []
    for _ in range(4):
      encoded = io.BytesIO()
      noise = Image.fromarray(rng.integers(0, 256, (400, 417, 3), dtype=np.uint8))
      noise.save(encoded, "png", compress_level=0)
      cells.append({"bytes": encoded.getvalue(), "path": None})
    data = {"image": cells, "label": list(range(4))}
    file = tmp_path / f"train-{shard:05d}-of-00012.parquet"
    datasets.Dataset.from_dict(data, features=features).to_parquet(str(file))
    size += file.stat().st_size
  assert size > 20e6
  shutil.copy(file, tmp_path / "test.parquet")
  # Whatever a first conversion imports is not counted.
  (tmp_path / "first").mkdir()
  for split in ("train", "test"):
    shutil.copy(file, tmp_path / "first" / f"{split}.parquet")
  load("parquet", path=str(tmp_path / "first"), image_size=64, stream=True)

  before = pa.default_memory_pool()
  pool = pa.proxy_memory_pool(before)
  pa.set_memory_pool(pool)
  tracemalloc.start()
  try:
    dataset = load("parquet", path=str(tmp_path), image_size=64, stream=True)
    for start in range(0, 48, 8):
      assert dataset.train.images[start : start + 8].shape == (8, 64, 64, 3)
    peak = pool.max_memory() + tracemalloc.get_traced_memory()[1]
    held = pool.bytes_allocated() + tracemalloc.get_traced_memory()[0]
  finally:
    tracemalloc.stop()
    pa.set_memory_pool(before)
  # Converting takes one file of 2 MB, encoded and in Arrow's form; then next to nothing is held.
  assert peak < size / 2 and held < size / 20
