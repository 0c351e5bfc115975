"""The kinds of values that a field may hold, each with a one-line error message."""

import difflib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from hamu_jax.errors import UserError

# A larger 32-bit seed or count would wrap around.
LARGEST_INT = 2**31 - 1


class Kind(Protocol):
  """The values that a field may have."""

  @property
  def optional(self) -> bool:
    """Whether a field may be left unset, None."""
    ...

  @property
  def type(self) -> type:
    """The Python type of a value."""
    ...

  @property
  def words(self) -> str:
    """The allowed values, for help and error messages."""
    ...

  def check(self, name: str, value: Any) -> None:
    """Raises a UserError that names the field, the value and the allowed values."""
    ...


class Number(NamedTuple):
  """A finite number in [low, high], or (low, high] with `open_low`.

  Attributes:
    low: least value.
    high: largest value.
    open_low: whether `low` itself is excluded.
    optional: whether the field may be left unset, None.
  """

  low: float = -math.inf
  high: float = math.inf
  open_low: bool = False
  optional: bool = False

  @property
  def type(self) -> type:
    return float

  @property
  def words(self) -> str:
    return _range_words(self.low, self.high, self.open_low)

  def check(self, name: str, value: Any) -> None:
    if value is None and self.optional:
      return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise UserError(f"{name}={value!r}: must be a number, {self.words}")
    in_range(name, value, self.low, self.high, open_low=self.open_low)


class Count(NamedTuple):
  """A whole number in [low, high]."""

  low: int = 0
  high: int = LARGEST_INT
  optional: bool = False

  @property
  def type(self) -> type:
    return int

  @property
  def words(self) -> str:
    return f"a whole number, {_range_words(self.low, self.high, False)}"

  def check(self, name: str, value: Any) -> None:
    if value is None and self.optional:
      return
    if isinstance(value, bool) or not isinstance(value, int):
      raise UserError(f"{name}={value!r}: must be {self.words}")
    in_range(name, value, self.low, self.high)


class Choice(NamedTuple):
  """One of some names.

  Attributes:
    choices: the names, or a table with these names as keys. It is read when a value is checked, so rows
      that are added to the table later are allowed.
  """

  choices: Iterable[str]
  optional: bool = False

  @property
  def type(self) -> type:
    return str

  @property
  def words(self) -> str:
    return "one of " + ", ".join(str(one) or '""' for one in self.choices)

  def check(self, name: str, value: Any) -> None:
    if value is None and self.optional:
      return
    choice(name, value, tuple(self.choices))


class Text(NamedTuple):
  """Any text."""

  optional: bool = False

  @property
  def type(self) -> type:
    return str

  @property
  def words(self) -> str:
    return "text"

  def check(self, name: str, value: Any) -> None:
    if value is None and self.optional:
      return
    if not isinstance(value, str):
      raise UserError(f"{name}={value!r}: must be text")


class Flag(NamedTuple):
  """True or False."""

  optional: bool = False

  @property
  def type(self) -> type:
    return bool

  @property
  def words(self) -> str:
    return "True or False"

  def check(self, name: str, value: Any) -> None:
    if value is None and self.optional:
      return
    if not isinstance(value, bool):
      raise UserError(f"{name}={value!r}: must be True or False")


class Several(NamedTuple):
  """A tuple of values of one kind.

  Attributes:
    of: the kind of each element.
    least: smallest number of elements.
  """

  of: Kind
  least: int = 0
  optional: bool = False

  @property
  def type(self) -> type:
    return tuple

  @property
  def words(self) -> str:
    return f"a tuple of values, each {self.of.words}"

  def check(self, name: str, value: Any) -> None:
    if value is None and self.optional:
      return
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
