"""Finds the optax wrappers around a transformation that takes more than one gradient.

Such a transformation gets its further gradients as extra arguments, which wrappers hand on unchanged. Where a
wrapper treats the first gradient in a way that the others would need, too, the result would be wrong.
"""

import sys
import types
from collections.abc import Collection
from typing import Any

import jax
import optax

# Accumulates the gradients of several steps.
ACCUMULATES = "MultiSteps"
# Skips a step if the gradient is not finite.
SKIPS = "apply_if_finite"


def is_masked(node: Any) -> bool:
  """Whether a node is what `optax.masked` puts in the place of a masked leaf."""
  return isinstance(node, optax.MaskedNode)


def any_masked(tree: Any) -> bool:
  """Whether a leaf of a tree is masked."""
  return any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked)))


def surrounding(wrappers: Collection[str]) -> str | None:
  """The name of a wrapper that is calling, None if there is none.

  Args:
    wrappers: names of functions or classes of optax.

  Returns:
    The innermost of them in the stack of calls. With `jit` these are the calls of tracing.
  """
  frame: types.FrameType | None = sys._getframe(1)
  while frame is not None:
    owner = frame.f_code.co_qualname.partition(".")[0]
    if owner in wrappers and str(frame.f_globals.get("__name__", "")).startswith("optax."):
      return owner
    frame = frame.f_back
  return None
