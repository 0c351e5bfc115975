"""Files from outside: what is right is read, whatever else is one line."""

import pathlib

import pytest

from hamu_jax import outside
from hamu_jax.errors import UserError


def test_a_byte_order_mark_is_dropped(tmp_path):
  file = tmp_path / "a.json"
  file.write_bytes(b'\xef\xbb\xbf{"a": [1]}')
  assert outside.read_json(file, dict, "") == {"a": [1]}


@pytest.mark.parametrize(
  "content, message",
  [
    (b"{", "a.json: cannot be read as JSON .*; write it again"),
    (b"\xff\xfe{", "a.json: cannot be read as JSON .*; write it again"),
    (b"[" * 100_000, "a.json: cannot be read as JSON .*; write it again"),
    (b"9" * 10_000, "a.json: cannot be read as JSON .*; write it again"),
    (b"3", "a.json: holds a JSON int where an object is needed; write it again"),
    (None, r"a.json: cannot be read \(No such file or directory\); write it again"),
  ],
)
def test_what_is_no_json(tmp_path, content, message):
  file = tmp_path / "a.json"
  if content is not None:
    file.write_bytes(content)
  with pytest.raises(UserError, match=message) as refusal:
    outside.read_json(file, dict, "write it again")
  assert "\n" not in str(refusal.value)


def test_a_file_without_end_or_too_large(tmp_path):
  with pytest.raises(UserError, match="/dev/zero: cannot be read as JSON .not a regular file"):
    outside.read_json(pathlib.Path("/dev/zero"), dict, "")
  sparse = tmp_path / "sparse.json"
  with sparse.open("wb") as file:
    file.truncate(outside.JSON_BYTES + 1)
  with pytest.raises(UserError, match="larger than 64 MiB"):
    outside.read_json(sparse, dict, "")


class PanicException(BaseException):
  """As Rust's panics, no `Exception`."""


@pytest.mark.parametrize(
  "error", [MemoryError(), RecursionError("deep"), PanicException("index\nout"), KeyError("a")]
)
def test_whatever_a_library_raises_is_one_line(error):
  with pytest.raises(UserError, match="^file: cannot be read as a table .*; remedy$") as refusal:
    with outside.read_of("file", "a table", "remedy"):
      raise error
  assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), UserError("as it is")])
def test_what_is_no_fault_of_the_file_passes(error):
  with pytest.raises(type(error)) as raised:
    with outside.read_of("file", "a table", "remedy"):
      raise error
  assert raised.value is error
