"""Saliency masks: the weights with the largest gradients on a forget set.

Source: SalUn (arXiv 2310.12508). Sharpness-Aware Machine Unlearning (arXiv 2506.13715) uses its masks to
separate the weights that unlearn from those that retain.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

Tree = Any
SELECTIONS = ("largest", "smallest")


def saliency_mask(gradients: Tree, fraction: float, *, select: str = "largest") -> Tree:
  """Marks the weights with the largest gradients of the whole model.

  The magnitudes |g| of all P parameters are ranked in one list. The first `int(P * fraction)` get 1, all
  others 0. Equal magnitudes rank in the order of the tree's leaves.

  Args:
    gradients: pytree of arrays, usually the sum of the mean gradients of all forget batches.
    fraction: share of ones, in (0, 1].
    select: "largest", or "smallest" to mark the smallest gradients. The sharpness paper's code does the
      latter because of a missing minus sign: its 10 % mask has a fraction of a percent of the gradient mass.

  Returns:
    Pytree of the same structure and shapes, int8 zeros and ones.

  Raises:
    ValueError: for a fraction outside (0, 1] or so small that no weight is marked, or an unknown selection.
  """
  if not 0 < fraction <= 1:
    raise ValueError(f"fraction={fraction!r}: choose a share of marked weights in (0, 1]")
  if select not in SELECTIONS:
    raise ValueError(f"select={select!r}: choose from {', '.join(SELECTIONS)}")
  vector, restore = ravel_pytree(jax.tree.map(jnp.abs, gradients))
  count = int(vector.size * fraction)
  if not count:
    raise ValueError(
      f"fraction={fraction!r} marks none of {vector.size} weights; choose at least {1 / vector.size:.3g}"
    )
  order = jnp.argsort(vector, descending=select == "largest", stable=True)
  marked = jnp.zeros(vector.shape, vector.dtype).at[order[:count]].set(1)
  return jax.tree.map(lambda leaf: leaf.astype(jnp.int8), restore(marked))


def complement(mask: Tree) -> Tree:
  """The mask of all other weights: ones where `mask` has zeros."""
  return jax.tree.map(lambda leaf: 1 - leaf, mask)


def apply_mask(tree: Tree, mask: Tree) -> Tree:
  """Sets unmarked entries to zero.

  Args:
    tree: pytree of arrays; unmarked NaN and infinities become zero, too.
    mask: pytree of zeros and ones, same structure and shapes.

  Returns:
    Pytree of the same structure, shapes and dtypes as `tree`.
  """
  return jax.tree.map(lambda leaf, keep: jnp.where(keep != 0, leaf, jnp.zeros_like(leaf)), tree, mask)
