"""The kinds of values that a field may hold, each with a one-line error message."""

import dataclasses
import difflib
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from hamu_jax.errors import UserError

# A larger 32-bit seed or count would wrap around.
LARGEST_INT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Kind:
  """The values that a field may have.

  Attributes:
    type: the Python type of a value.
    optional: whether a field may be left unset, None.
  """

  type: ClassVar[type]
  optional: bool = dataclasses.field(default=False, kw_only=True)

  @property
  def words(self) -> str:
    """The allowed values, for help and error messages."""
    raise NotImplementedError

  def check(self, name: str, value: Any) -> None:
    """Raises a UserError that names the field, the value and the allowed values."""
    if value is not None or not self.optional:
      self._check(name, value)

  def _check(self, name: str, value: Any) -> None:
    """`check` of a value that is set."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Number(Kind):
  """A finite number in [low, high]; `open_low` and `open_high` leave out that end."""

  type = float
  low: float = -math.inf
  high: float = math.inf
  open_low: bool = False
  open_high: bool = False

  @property
  def words(self) -> str:
    return f"a number, {_range_words(self.low, self.high, self.open_low, self.open_high)}"

  def _check(self, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise UserError(f"{name}={value!r}: must be {self.words}; give such a value")
    in_range(name, value, self.low, self.high, open_low=self.open_low, open_high=self.open_high)


@dataclasses.dataclass(frozen=True)
class Count(Kind):
  """A whole number in [low, high]."""

  type = int
  low: int = 0
  high: int = LARGEST_INT

  @property
  def words(self) -> str:
    return f"a whole number, {_range_words(self.low, self.high)}"

  def _check(self, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
      raise UserError(f"{name}={value!r}: must be {self.words}; give such a value")
    in_range(name, value, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class CountOrPair(Count):
  """A whole number for both roles, or a pair of them: (retain, forget)."""

  @property
  def words(self) -> str:
    return f"{super().words}, or a pair of them (retain, forget)"

  def _check(self, name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)):
      return super()._check(name, value)
    if len(value) != 2:
      raise UserError(f"{name}={tuple(value)!r}: must be {self.words}; give such a value")
    for element in value:
      super()._check(name, element)


@dataclasses.dataclass(frozen=True)
class Choice(Kind):
  """One of some names.

  Attributes:
    choices: the names, or a table with these names as keys. It is read when a value is checked, so rows
      that are added to the table later are allowed.
  """

  type = str
  choices: Iterable[str]

  @property
  def words(self) -> str:
    return "one of " + ", ".join(str(one) or '""' for one in self.choices)

  def _check(self, name: str, value: Any) -> None:
    choice(name, value, tuple(self.choices))


@dataclasses.dataclass(frozen=True)
class Text(Kind):
  """A text.

  Attributes:
    lines: whether it may have several lines.
    pattern: regular expression that a text that is not empty must match as a whole; "" for any text.
    form: what `pattern` matches, for help and error messages.
  """

  type = str
  lines: bool = False
  pattern: str = ""
  form: str = "text"

  @property
  def words(self) -> str:
    return self.form

  def _check(self, name: str, value: Any) -> None:
    if not isinstance(value, str):
      raise UserError(f"{name}={value!r}: must be {self.words}; give such a value")
    allowed = "\n\t" if self.lines else ""
    if any(not letter.isprintable() and letter not in allowed for letter in value):
      raise UserError(f"{name}={value!r}: holds unprintable characters; leave them out")
    if value and self.pattern and not re.fullmatch(self.pattern, value):
      raise UserError(f"{name}={value!r}: must be {self.words}; give such a value")


@dataclasses.dataclass(frozen=True)
class Path(Text):
  """The path of something that is read.

  Attributes:
    is_there: (path) -> whether it is what the field needs.
    what: what the field needs, for error messages.
    remedy: what to give instead, for error messages.
    others: words that are allowed, too, and are no paths.
    hub: whether the id of a Hugging Face repository may be given instead.
  """

  form: str = "a path"
  is_there: Callable[[pathlib.Path], bool] = lambda path: path.is_file() or path.is_dir()
  what: str = "file or folder"
  remedy: str = "give one that exists"
  others: tuple[str, ...] = ()
  hub: bool = False

  def check_there(self, name: str, value: str) -> None:
    """Raises a UserError unless the path leads to what the field needs, and may be read."""
    if not value or value in self.others:
      return
    path = pathlib.Path(value)
    if self.hub and re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", value) and not os.path.lexists(path):
      # An id of the hub; a name with an ending is meant as a file.
      if not value.endswith(".gguf"):
        return
    try:
      found = self.is_there(path)
    except OSError:  # Such as a name that is too long, or a folder that may not be searched.
      found = False
    if not found:
      raise UserError(f"{name}={value!r}: no such {self.what}; {self.remedy}")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
      raise UserError(f"{name}={value!r}: may not be read; change its permissions, or {self.remedy}")


@dataclasses.dataclass(frozen=True)
class OutputFolder(Text):
  """The path of a folder that is written, and made where it is missing."""

  form: str = "path of a folder"

  def check_there(self, name: str, value: str) -> None:
    """Raises a UserError unless the folder exists or can be made, and may be written."""
    path = pathlib.Path(value).absolute()
    while not os.path.lexists(path) and path != path.parent:
      path = path.parent
    if value and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
      why = "may not be written" if path.is_dir() else "is not a folder"
      raise UserError(f"{name}={value!r}: {path} {why}; choose another folder")


@dataclasses.dataclass(frozen=True)
class Flag(Kind):
  """True or False."""

  type = bool

  @property
  def words(self) -> str:
    return "True or False"

  def _check(self, name: str, value: Any) -> None:
    if not isinstance(value, bool):
      raise UserError(f"{name}={value!r}: must be {self.words}; give such a value")


@dataclasses.dataclass(frozen=True)
class Several(Kind):
  """A tuple of values of one kind.

  Attributes:
    of: the kind of each element.
    least: least number of elements.
    distinct: whether each value may be given only once.
  """

  type = tuple
  of: Kind
  least: int = 0
  distinct: bool = False

  @property
  def words(self) -> str:
    return f"a tuple of values, each {self.of.words}"

  def _check(self, name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)):
      raise UserError(f"{name}={value!r}: must be {self.words}; give such a value")
    for element in value:
      if element == "":
        raise UserError(f"{name}={tuple(value)!r}: holds an empty text; leave it out")
      self.of.check(name, element)
    if len(value) < self.least:
      raise UserError(f"{name}={value!r}: needs at least {self.least} value; give {self.words}")
    if self.distinct and (twice := [element for element in value if value.count(element) > 1]):
      raise UserError(f"{name}={tuple(value)!r}: holds {twice[0]!r} twice; leave one out")


def choice(name: str, value: Any, choices) -> None:
  """Raises a UserError unless `value` is one of `choices`."""
  if value not in choices:
    nearest = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise UserError(f"{name}={value!r}: choose from {', '.join(choices)}{hint}")


def in_range(
  name: str, value, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> None:
  """Raises a UserError unless `value` is None, or finite and in [low, high] without the open ends."""
  if value is None:
    return
  inside = (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
  if not inside or not math.isfinite(value):  # NaN is not inside either.
    finite = " and finite" if low > -math.inf and high == math.inf and math.isinf(value) else ""
    words = _range_words(low, high, open_low, open_high)
    raise UserError(f"{name}={value!r}: must be {words}{finite}; give such a value")


def _range_words(low: float, high: float, open_low: bool = False, open_high: bool = False) -> str:
  bound = f"{'above' if open_low else 'at least'} {low:g}" if low > -math.inf else "finite"
  most = f"{high:d}" if isinstance(high, int) else f"{high:g}"
  return bound + (f" and {'below' if open_high else 'at most'} {most}" if high < math.inf else "")
