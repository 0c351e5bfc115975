"""The kinds of values that a field may hold, each with a one-line error message."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
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
  """A finite number in [low, high], or (low, high] with `open_low`."""

  type = float
  low: float = -math.inf
  high: float = math.inf
  open_low: bool = False

  @property
  def words(self) -> str:
    return f"a number, {_range_words(self.low, self.high, self.open_low)}"

  def _check(self, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise UserError(f"{name}={value!r}: must be {self.words}")
    in_range(name, value, self.low, self.high, open_low=self.open_low)


@dataclasses.dataclass(frozen=True)
class Count(Kind):
  """A whole number in [low, high]."""

  type = int
  low: int = 0
  high: int = LARGEST_INT

  @property
  def words(self) -> str:
    return f"a whole number, {_range_words(self.low, self.high, False)}"

  def _check(self, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
      raise UserError(f"{name}={value!r}: must be {self.words}")
    in_range(name, value, self.low, self.high)


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
  """Any text."""

  type = str

  @property
  def words(self) -> str:
    return "text"

  def _check(self, name: str, value: Any) -> None:
    if not isinstance(value, str):
      raise UserError(f"{name}={value!r}: must be text")


@dataclasses.dataclass(frozen=True)
class Flag(Kind):
  """True or False."""

  type = bool

  @property
  def words(self) -> str:
    return "True or False"

  def _check(self, name: str, value: Any) -> None:
    if not isinstance(value, bool):
      raise UserError(f"{name}={value!r}: must be {self.words}")


@dataclasses.dataclass(frozen=True)
class Several(Kind):
  """A tuple of values of one kind.

  Attributes:
    of: the kind of each element.
    least: least number of elements.
  """

  type = tuple
  of: Kind
  least: int = 0

  @property
  def words(self) -> str:
    return f"a tuple of values, each {self.of.words}"

  def _check(self, name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)):
      raise UserError(f"{name}={value!r}: must be {self.words}")
    for element in value:
      self.of.check(name, element)
    if len(value) < self.least:
      raise UserError(f"{name}={value!r}: needs at least {self.least} value; give {self.words}")


def choice(name: str, value: Any, choices) -> None:
  """Raises a UserError unless `value` is one of `choices`."""
  if value not in choices:
    nearest = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise UserError(f"{name}={value!r}: choose from {', '.join(choices)}{hint}")


def in_range(name: str, value, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
  """Raises a UserError unless `value` is None or in [low, high], or (low, high] with `open_low`."""
  if value is None:
    return
  inside = (value > low if open_low else value >= low) and value <= high and math.isfinite(value)
  if not inside:  # NaN is not inside either.
    finite = " and finite" if low > -math.inf and math.isinf(value) else ""
    raise UserError(f"{name}={value!r}: must be {_range_words(low, high, open_low)}{finite}")


def _range_words(low: float, high: float, open_low: bool) -> str:
  bound = f"{'above' if open_low else 'at least'} {low:g}" if low > -math.inf else "finite"
  most = f"{high:d}" if isinstance(high, int) else f"{high:g}"
  return bound + (f" and at most {most}" if high < math.inf else "")
