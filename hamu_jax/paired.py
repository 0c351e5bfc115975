"""The pair that holds one thing for the retain set and one for the forget set."""

from typing import Any, NamedTuple


class Paired(NamedTuple):
  """One thing for each role; a pytree, so `jax.tree.map` maps over both."""

  retain: Any
  forget: Any
