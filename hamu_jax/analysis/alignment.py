"""The angle between the retain and the forget gradient, by tensor and for the whole model."""

from typing import Any, NamedTuple

import jax
from jax.flatten_util import ravel_pytree

from hamu_jax.transforms import alignment
from hamu_jax.transforms.alignment import tensor_names

__all__ = ["Angles", "angles", "tensor_names"]


class Angles(NamedTuple):
  """Angles in degrees: 0 parallel, 90 orthogonal or one of the two zero, 180 opposed."""

  tensor: jax.Array  # [T] one a tensor, in tree-leaf order: that of `tensor_names`
  model: jax.Array  # [] of all tensors read as one vector


def angles(retain_grads: Any, forget_grads: Any) -> Angles:
  r"""Angles :math:`\angle(g_r, g_f)`; pure and jittable, finite also at zero gradients.

  Of the gradients as they are given: for cross-entropy on both sets, 0 degrees means that what
  lowers the retain loss also lowers the forget loss, so that forgetting is hard.

  Args:
    retain_grads: Pytree of arrays.
    forget_grads: Same structure and shapes.

  Returns:
    The `Angles`, in the dtype of the gradients (at least float32).
  """
  retain_vector, _ = ravel_pytree(retain_grads)
  forget_vector, _ = ravel_pytree(forget_grads)
  return Angles(
    tensor=alignment.align(retain_grads, forget_grads).angle,
    model=alignment.align(retain_vector, forget_vector).angle[0],
  )
