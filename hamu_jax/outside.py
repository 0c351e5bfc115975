"""Files from outside are data, never code: each is read once, at the door, and each fault is one line."""

import contextlib
import json
import pathlib
import stat
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from hamu_jax.errors import UserError, brief, first_line

# Descriptions such as config.json are far smaller; a larger file is something else.
JSON_BYTES = 64 * 2**20
# Largest size of a file of arrays, unpacked. A file of zeros unpacks to a thousand times its size.
ARRAY_BYTES = 2**31
# What Rust code, such as that of safetensors and tokenizers, raises for a broken assumption of its own.
_PANIC = "PanicException"


@contextlib.contextmanager
def read_of(file: object, what: str, remedy: str) -> Iterator[None]:
  """A context in which an exception of a library that reads a file becomes one line.

  Libraries raise many types for a damaged file: of the system, of compression, memory and recursion errors,
  and panics of Rust code, which are no `Exception`.

  Args:
    file: name of the file, or of the field that names it.
    what: what it should be, to follow "cannot be read as": "a safetensors file".
    remedy: what the user can do, such as "download it again".

  Raises:
    UserError: in place of any exception but a `UserError` or one that ends the process.
  """
  try:
    yield
  except UserError:
    raise
  except OSError as error:
    raise UserError(f"{file}: cannot be read ({error.strerror or first_line(error)}); {remedy}") from None
  except BaseException as error:
    # An exception that ends the process passes.
    if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
      raise
    raise UserError(f"{file}: cannot be read as {what} ({brief(error)}); {remedy}") from None


def text_of(file: pathlib.Path, *, limit: int | None = None, errors: str = "strict") -> str:
  """Reads a text file in UTF-8, without the byte order mark with which Windows programs begin it.

  Args:
    file: path of the file.
    limit: largest size in bytes; None for no limit.
    errors: what becomes of bytes that are not UTF-8, as for `bytes.decode`.

  Raises:
    OSError: if it cannot be read.
    ValueError: if it is not UTF-8, larger, or no regular file: a device or a pipe has no end.
  """
  status = file.stat()
  if not stat.S_ISREG(status.st_mode):
    raise ValueError("not a regular file")
  if limit is not None and status.st_size > limit:
    raise ValueError(f"larger than {limit >> 20} MiB")
  return file.read_bytes().decode("utf-8-sig", errors)


_KINDS: dict[type, str] = {dict: "an object", list: "a list"}


def read_json(file: pathlib.Path, kind: type, remedy: str) -> Any:
  """Reads a JSON file of at most `JSON_BYTES`.

  Args:
    file: path of the file.
    kind: type of the outermost value, dict or list.
    remedy: what the user can do if the file is wrong.

  Returns:
    The value.

  Raises:
    UserError: if the file is missing, too large, not JSON, nested too deeply, or holds another type.
  """
  with read_of(file, "JSON", remedy):
    values = json.loads(text_of(file, limit=JSON_BYTES))
  if not isinstance(values, kind):
    raise UserError(f"{file}: holds a JSON {type(values).__name__} where {_KINDS[kind]} is needed; {remedy}")
  return values


def arrays_of(file: pathlib.Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
  """Reads an `.npy` or `.npz` file of numbers and texts; a pickled array is refused.

  Args:
    file: path of the file.
    names: arrays to read, if the file has them; None for all.

  Returns:
    The arrays by name; that of an `.npy` is named "".

  Raises:
    Exception: of many types, if the file is damaged, encrypted, pickled, or its arrays are larger than
      `ARRAY_BYTES`; see `read_of`.
  """
  if file.stat().st_size > ARRAY_BYTES:
    raise ValueError(f"larger than {ARRAY_BYTES >> 20} MiB")
  loaded = np.load(file, allow_pickle=False)
  if isinstance(loaded, np.ndarray):
    return {"": loaded}
  with loaded:
    # What the archive says of its sizes holds: a member that is longer is cut off there.
    if sum(member.file_size for member in loaded.zip.infolist()) > ARRAY_BYTES:
      raise ValueError(f"its arrays are larger than {ARRAY_BYTES >> 20} MiB")
    return {name: loaded[name] for name in loaded.files if names is None or name in names}
