"""Datasets that strangers wrote: odd names, labels and photographs are read, hostile files refused."""

import gzip
import io
import pathlib
import struct
import tarfile
import zipfile
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hamu_jax.data import cifar10_binary, load, shards, splits
from hamu_jax.data.encoded import EncodedImages
from hamu_jax.errors import UserError

_PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)


def _encode(pixels, kind="png", **options):
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, kind, **options)
  return buffer.getvalue()


def _table(labels, images=None, names=None):
  images = [_encode(pixels) for pixels in _PIXELS[: len(labels)]] if images is None else images
  table = pa.table({"img": pa.array(images), "label": labels})
  if names is None:
    return table
  features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
  return table.replace_schema_metadata(features.arrow_schema.metadata)


def _write(folder, **tables):
  for split, table in tables.items():
    pq.write_table(table, folder / f"{split}.parquet")
  return str(folder)


# --- labels ---


@pytest.mark.parametrize(
  "train, test, names, numbers",
  [
    (["dog", "cat", "dog", "cat"], ["cat", "dog"], ("cat", "dog"), [1, 0, 1, 0, 0, 1]),
    ([True, False, True, False], [False, True], ("False", "True"), [1, 0, 1, 0, 0, 1]),
    ([1.0, 0.0, 2.0, 2.0], [0.0, 2.0], ("0", "1", "2"), [1, 0, 2, 2, 0, 2]),
  ],
)
def test_labels_of_any_type(tmp_path, train, test, names, numbers):
  dataset = load("parquet", path=_write(tmp_path, train=_table(train), test=_table(test)), label_key="label")
  assert dataset.class_names == names
  assert [*dataset.train.labels, *dataset.test.labels] == numbers


@pytest.mark.parametrize(
  "labels, message",
  [
    ([0.0, 1.5, 0.0, 1.0], "train example 1 has the label 1.5, which is no class number"),
    ([0.0, float("nan"), 0.0, 1.0], "train example 1 has the label nan"),
    (["a", "b", "c", "d"], "holds 4 different words in 6 rows, so it names no classes"),
    ([[0], [1], [0], [1]], r"holds list<.*where class numbers \(integers\), words or booleans are needed"),
  ],
)
def test_labels_that_are_no_classes(tmp_path, labels, message):
  test = _table([labels[0], labels[2]])
  with pytest.raises(UserError, match=f"config.data.label_key='label'.*{message}"):
    load("parquet", path=_write(tmp_path, train=_table(labels), test=test), label_key="label")


def test_a_split_that_lists_its_classes_in_another_order(tmp_path):
  train, test = _table([0, 1, 2], names=["a", "b", "c"]), _table([0, 1, 2], names=["c", "a", "b"])
  dataset = load("parquet", path=_write(tmp_path, train=train, test=test))
  assert dataset.class_names == ("a", "b", "c") and dataset.test.labels.tolist() == [2, 0, 1]
  _write(tmp_path, test=_table([0, 1, 2], names=["a", "b", "d"]))
  with pytest.raises(UserError, match="test and train have different classes"):
    load("parquet", path=str(tmp_path))


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": {"features": {"img": 3}}}', b"[" * 10**5])
def test_metadata_that_are_not_hugging_faces(tmp_path, metadata):
  table = _table([0, 1, 0]).replace_schema_metadata({b"huggingface": metadata})
  with pytest.raises(UserError, match="train.parquet': cannot be read as a parquet file with metadata"):
    load("parquet", path=_write(tmp_path, train=table, test=table))


# --- names of files ---


def test_files_of_a_split():
  names = ["train", "train_extra", "bio-forget-corpus", "test-00001-of-00002", "test-00000-of-00002"]
  names += ["old-00000-of-00001-0123456789abcdef"]
  found = shards.by_split(pathlib.Path(f"{name}.parquet") for name in names)
  assert {split: [file.stem for file in files] for split, files in found.items()} == {
    "train": ["train"],
    "train_extra": ["train_extra"],
    "bio-forget-corpus": ["bio-forget-corpus"],
    "test": ["test-00000-of-00002", "test-00001-of-00002"],
    "old": ["old-00000-of-00001-0123456789abcdef"],
  }


@pytest.mark.parametrize(
  "names, message",
  [
    (["a-00000-of-00003", "a-00002-of-00003"], r"shard 1 of the 3 of 'a' is missing \(1 in all\)"),
    (["a-00000-of-00001", "a-00000-of-00002"], "are shards of 2 datasets"),
  ],
)
def test_shards_that_are_not_one_dataset(names, message):
  with pytest.raises(UserError, match=message):
    shards.by_split(pathlib.Path(f"{name}.parquet") for name in names)


# --- images ---


def _images(*encoded):
  return EncodedImages(lambda row: encoded[row], np.arange(len(encoded)), "train image")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_datasets_turns_them(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  value = _encode(_PIXELS[0], exif=exif)
  decoded = datasets.Image().decode_example({"bytes": value, "path": None})
  np.testing.assert_array_equal(_images(value)[:][0], np.asarray(decoded))


# Writes a file if Ghostscript runs it.
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file closefile showpage\n"


@pytest.mark.parametrize(
  "value", [_EPS, _encode(_PIXELS[0], "dds"), _encode(_PIXELS[0], "ico"), b"\x00" * 64, b""]
)
def test_other_formats_are_not_opened(value, monkeypatch):
  monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
  with pytest.raises(UserError, match="train image 0 cannot be decoded .not of a format that is read: JPEG"):
    _images(value)[:]


def test_pixels_are_bounded():
  """A PNG of a few bytes that says it has 60,000 x 60,000 pixels, and one just above the bound."""

  def png(width, height):
    def chunk(kind, body):
      return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")

  for size in (60_000, 10_000):
    with pytest.raises(UserError, match="train image 0 cannot be decoded .*pixels"):
      _images(png(size, size))[:]


def test_paths_stay_in_the_folder_of_the_dataset(tmp_path):
  folder = tmp_path / "dataset"
  (folder / "photos").mkdir(parents=True)
  (folder / "photos" / "a.png").write_bytes(_encode(_PIXELS[0]))
  (tmp_path / "secret.png").write_bytes(_encode(_PIXELS[1]))
  (folder / "link.png").symlink_to(tmp_path / "secret.png")
  (folder / "endless.png").symlink_to("/dev/zero")

  def train(path):
    images = [{"bytes": None, "path": path}, {"bytes": _encode(_PIXELS[2]), "path": None}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    tables = {name: _table([0, 1], pa.array(images, kind)) for name in ("train", "test")}
    return load("parquet", path=_write(folder, **tables)).train.images

  np.testing.assert_array_equal(train("photos/a.png"), _PIXELS[[0, 2]])
  for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "endless.png", "gone.png"):
    with pytest.raises(UserError, match=f"image 0 cannot be decoded .*{path}.*not in the dataset's folder"):
      train(path)


# --- archives and arrays ---


def test_a_batch_file_without_end(tmp_path):
  (tmp_path / "data_batch_1.bin").symlink_to("/dev/zero")
  with pytest.raises(UserError, match="data_batch_1.bin': cannot be read as a batch .it is no regular file"):
    load("cifar10_binary", path=str(tmp_path))


def test_an_archive_that_unpacks_to_any_size(tmp_path):
  """The header of a member says 8 GiB; nothing of it has to be there."""
  member = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
  member.size = 8 * 2**30
  path = tmp_path / cifar10_binary.ARCHIVE
  path.write_bytes(gzip.compress(member.tobuf()))
  with pytest.raises(UserError, match="cannot be read as an archive .it unpacks to more than 1024 MiB"):
    load("cifar10_binary", path=str(path))


def _npz(path, change):
  np.savez_compressed(path, a=np.arange(3))
  content = bytearray(path.read_bytes())
  change(content)
  path.write_bytes(content)


def _encrypt(content):
  # Bit 0 of the flags, in the local header and in the directory.
  content[6] |= 1
  content[content.rindex(b"PK\x01\x02") + 8] |= 1


def _claim(content):
  """Says that the array has 2 TiB."""
  entry = content.rindex(b"PK\x01\x02")
  content[entry + 24 : entry + 28] = struct.pack("<I", 0xFFFFFFFE)


def _damage(content):
  content[60:80] = bytes(20)


@pytest.mark.parametrize("change, message", [(_encrypt, "encrypted"), (_claim, "larger than"), (_damage, "")])
def test_arrays_that_cannot_be_read(tmp_path, change, message):
  path = tmp_path / "rows.npz"
  _npz(path, change)
  with pytest.raises(UserError, match=f"forget_indices=.*cannot be read as example numbers .*{message}"):
    splits.read_indices(str(path))


def test_a_header_that_claims_more_than_there_is(tmp_path):
  path = tmp_path / "rows.npz"
  with zipfile.ZipFile(path, "w") as archive, archive.open("a.npy", "w") as member:
    np.lib.format.write_array_header_1_0(member, {"descr": "<i8", "fortran_order": False, "shape": (2**50,)})
  with pytest.raises(UserError, match="cannot be read as example numbers"):
    splits.read_indices(str(path))


@pytest.mark.parametrize("name", ["rows.txt", "rows.json"])
def test_numbers_that_windows_programs_saved(tmp_path, name):
  text = b"0\r\n3\r\n" if name == "rows.txt" else b"[0,\r\n3]"
  (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text)
  assert splits.read_indices(str(tmp_path / name)).tolist() == [0, 3]
