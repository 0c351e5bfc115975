"""Checks of configuration values, each an error of one line that says what would be right."""

import difflib
import math
from typing import Any

from hamu_jax.errors import UserError


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
    bound = f"{'above' if open_low else 'at least'} {low:g}" if low > -math.inf else "finite"
    bound += f" and at most {high:g}" if high < math.inf else ""
    bound += " and finite" if low > -math.inf and math.isinf(value) else ""
    raise UserError(f"{name}={value!r}: must be {bound}")
