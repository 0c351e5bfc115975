"""CIFAR-10's original binary archive.

Each record is one label byte and 3,072 pixel bytes (red, green and blue planes of 32 x 32); each
batch file holds the same number of records (10,000 as published).

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009).
"""

import pathlib
import tarfile

import numpy as np

from hamu_jax import outside
from hamu_jax.data.dataset import Contents, ImageSplit, Request
from hamu_jax.errors import UserError

ARCHIVE = "cifar-10-binary.tar.gz"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILE = "test_batch.bin"
# In the order of the published batches.meta.txt.
CLASS_NAMES = (
  "airplane",
  "automobile",
  "bird",
  "cat",
  "deer",
  "dog",
  "frog",
  "horse",
  "ship",
  "truck",
)
RECORD_BYTES = 1 + 3 * 32 * 32
# Largest size of a batch file, and of what an archive unpacks to. The published ones have 30 and 176 MiB.
MAX_BYTES = 2**30


def read(request: Request) -> Contents:
  """Reads `cifar-10-binary.tar.gz`, the folder it unpacks to, or a folder holding either.

  Args:
    request: its `path` is one of these.

  Returns:
    Both splits, channels last.

  Raises:
    UserError: if the path is missing, is the python version, or is incomplete or corrupt.
  """
  path = pathlib.Path(request.path)
  if not request.path or not path.exists():
    raise UserError(
      f"config.data.path={request.path!r} does not exist: give {ARCHIVE} or the folder it unpacks to"
    )
  batches = _read_files(path)
  train = [_decode(batches, name) for name in TRAIN_FILES]
  test = _decode(batches, TEST_FILE)
  lengths = {name: len(batches[name]) // RECORD_BYTES for name in (*TRAIN_FILES, TEST_FILE)}
  if len(set(lengths.values())) > 1:
    raise UserError(
      f"config.data.path={request.path!r} is truncated: its batches differ in length ({lengths});"
      f" download {ARCHIVE} again"
    )
  images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
  return Contents(ImageSplit(images, labels), test, CLASS_NAMES)


def _read_files(path: pathlib.Path) -> dict[str, bytes]:
  """Reads the batch files, by name, from an archive or a folder."""
  if path.is_file():
    return _read_archive(path)
  for folder in (path, path / "cifar-10-batches-bin"):
    files = {file.name: file for file in folder.glob("*_batch*")}
    _refuse_pickle(files, path)
    if set(files) & {*TRAIN_FILES, TEST_FILE}:
      return {name: _bytes(file) for name, file in files.items() if name.endswith(".bin")}
  if (path / ARCHIVE).is_file():
    return _read_archive(path / ARCHIVE)
  raise UserError(
    f"config.data.path='{path}' holds neither {TRAIN_FILES[0]} nor {ARCHIVE}; give the archive or the"
    " folder it unpacks to"
  )


def _bytes(file: pathlib.Path) -> bytes:
  """Reads a batch file. A link to a device would have no end."""
  with outside.read_of(f"config.data.path: '{file}'", "a batch", f"download {ARCHIVE} again"):
    if not file.is_file() or file.stat().st_size > MAX_BYTES:
      raise ValueError(f"it is no regular file of at most {MAX_BYTES >> 20} MiB")
    return file.read_bytes()


def _read_archive(path: pathlib.Path) -> dict[str, bytes]:
  """Reads the batch files out of the archive, without unpacking it to disk."""
  batches = {}
  with outside.read_of(f"config.data.path='{path}'", "an archive", f"download {ARCHIVE} again"):
    with tarfile.open(path) as archive:
      for member in archive:
        # Members are read one after the other, those that are not wanted, too.
        if member.offset_data + member.size > MAX_BYTES:
          raise ValueError(f"it unpacks to more than {MAX_BYTES >> 20} MiB")
        name = pathlib.PurePosixPath(member.name).name
        _refuse_pickle([name], path)
        if member.isfile() and name in (*TRAIN_FILES, TEST_FILE):
          file = archive.extractfile(member)
          assert file is not None  # It is a file.
          batches[name] = file.read()
  return batches


def _refuse_pickle(names, path: pathlib.Path) -> None:
  """Refuses the archive's python version by its file names, before reading any of it."""
  if "data_batch_1" in names:
    raise UserError(
      f"config.data.path='{path}' is the python version of CIFAR-10: a pickle, which can run any"
      f" code when it is loaded, so it is refused; use the binary version, {ARCHIVE}"
    )


def _decode(batches: dict[str, bytes], name: str) -> ImageSplit:
  """Turns one batch file into images [n, 32, 32, 3] and labels [n]."""
  data = batches.get(name, b"")
  if not data or len(data) % RECORD_BYTES:
    defect = f"{len(data)} bytes, not a multiple of {RECORD_BYTES}" if data else "missing or empty"
    raise UserError(f"config.data.path: {name} is {defect}; download {ARCHIVE} again")
  records = np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES)
  images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return ImageSplit(np.ascontiguousarray(images), records[:, 0])
