"""The pair in which everything about the retain and the forget set travels."""

from typing import Any, NamedTuple


class Paired(NamedTuple):
  """One thing for each role; a pytree, so `jax.tree.map` goes through both."""

  retain: Any
  forget: Any
