"""Content digests of a folder: damage is noticed before its files are used.

The file `digests.json` of a folder names what the folder is of and holds the SHA-256 of every other file. It
is written last, so a folder without it was written by an older version, or its writer was killed; such a
folder is taken as it is.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from hamu_jax.errors import UserError

FILE = "digests.json"
_THREADS = 4
# A digest and a path have some hundred bytes, and no folder has a million files.
_MOST_BYTES = 2**28


def write(folder: pathlib.Path, of: Mapping[str, Any]) -> None:
  """Writes the digests of a folder that is complete.

  Args:
    folder: folder; its files do not change afterwards.
    of: JSON values that identify the content, such as stage and key.

  Raises:
    OSError: a file cannot be read, or the digests cannot be written.
  """
  text = json.dumps({"of": of, "files": _digests(folder, _names(folder))}, indent=1, sort_keys=True)
  partial = folder / f".{FILE}.partial"
  with open(partial, "w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, folder / FILE)


def damage(folder: pathlib.Path, of: Mapping[str, Any]) -> str | None:
  """Says what is damaged in a folder, in a few words.

  Args:
    folder: folder.
    of: the values that `write` got.

  Returns:
    None if all files have the content that was written, or if the folder has no digests.

  Raises:
    UserError: a file may not be read.
  """
  try:
    if (folder / FILE).stat().st_size > _MOST_BYTES:
      return f"{FILE} is too large"
    there = json.loads((folder / FILE).read_bytes())
    if not isinstance(there, dict) or not isinstance(there.get("files"), dict):
      return f"{FILE} holds no digests"
    if there.get("of") != json.loads(json.dumps(of)):
      return "it is another one under this name"
    # Only files of the folder are read, whatever names the digests have.
    names = _names(folder)
    if missing := sorted(set(there["files"]) - set(names)):
      return f"{missing[0]} is missing"
    found = _digests(folder, [name for name in names if name in there["files"]])
  except FileNotFoundError as error:
    return f"{_name(error, folder)} is missing" if has_digests(folder) else None
  except PermissionError as error:
    raise UserError(
      f"{error.filename}: {error.strerror}; make it readable or choose another folder"
    ) from error
  except OSError as error:
    return f"{_name(error, folder)} cannot be read: {error.strerror}"
  except (ValueError, RecursionError):
    return f"{FILE} is not JSON"
  changed = [name for name, digest in found.items() if digest != there["files"][name]]
  return f"the content of {changed[0]} has changed" if changed else None


def has_digests(folder: pathlib.Path) -> bool:
  """Whether the digests of a folder were written."""
  return (folder / FILE).exists()


def set_aside(path: pathlib.Path, reason: str, then: str) -> None:
  """Renames a damaged file or folder to `NAME.damaged-N`, and prints one line about it.

  Args:
    path: file or folder. If another process has renamed it already, nothing happens.
    reason: what is damaged.
    then: what happens next.

  Raises:
    UserError: it cannot be renamed.
  """
  number = 1
  while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
    number += 1
  try:
    path.rename(target)
  except FileNotFoundError:
    return
  except OSError as error:
    raise UserError(
      f"{path} is damaged ({reason}) and cannot be renamed ({error.strerror}); rename or delete it, then run "
      "the same command again"
    ) from error
  print(f"note: {path} is damaged ({reason}): kept as {target.name}; {then}", file=sys.stderr, flush=True)


def _names(folder: pathlib.Path) -> list[str]:
  """The files of a folder that have digests."""
  return [
    path.relative_to(folder).as_posix()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.name != FILE
  ]


def _digests(folder: pathlib.Path, names: list[str]) -> dict[str, str]:
  """The SHA-256 of files in hexadecimal digits, by their names."""

  def digest(name: str) -> str:
    # Read in pieces; neither reading nor hashing holds Python's lock.
    with open(folder / name, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(names, pool.map(digest, names), strict=True))


def _name(error: OSError, folder: pathlib.Path) -> str:
  return os.path.relpath(error.filename, folder) if error.filename else folder.name
