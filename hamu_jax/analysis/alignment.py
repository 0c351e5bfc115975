"""The angle between the retain and the forget gradient, by tensor and for the whole model."""

from typing import Any, NamedTuple

import jax
from jax.flatten_util import ravel_pytree

from hamu_jax.transforms import alignment
from hamu_jax.transforms.alignment import tensor_names

__all__ = ["Angles", "angles", "tensor_names"]


class Angles(NamedTuple):
  """Angles in degrees: 0 if parallel, 90 if orthogonal or one of the two is zero, 180 if opposed."""

  tensor: jax.Array  # [T] one per tensor, in tree-leaf order, which is that of `tensor_names`
  model: jax.Array  # [] angle of all tensors as one vector


def angles(retain_grads: Any, forget_grads: Any) -> Angles:
  r"""Angles :math:`\angle(g_r, g_f)`; pure, jittable, and finite for zero gradients.

  For gradients of the cross-entropy on both sets, 0 degrees means that a step that lowers the retain loss
  also lowers the forget loss, so that forgetting is hard.

  Args:
    retain_grads: Pytree of arrays, g_r.
    forget_grads: Pytree of the same structure and shapes, g_f.

  Returns:
    The `Angles`, in the dtype of the gradients (at least float32).
  """
  retain_vector, _ = ravel_pytree(retain_grads)
  forget_vector, _ = ravel_pytree(forget_grads)
  return Angles(
    tensor=alignment.align(retain_grads, forget_grads).angle,
    model=alignment.align(retain_vector, forget_vector).angle[0],
  )
