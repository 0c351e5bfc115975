"""Baselines that remove the conflicting part of the gradients: GRU and PCGrad.

The retain loss is descended and the forget loss ascended, so the roles conflict when g_r . g_f > 0. The dot
product and the norms are those of the whole model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hamu_jax.errors import UserError
from hamu_jax.transforms import alignment, pair

_SQUARED_NORM_FLOOR = 1e-12


class ConflictState(NamedTuple):
  """State of `gru` and `pcgrad`, which describes the last update."""

  conflict: jax.Array  # [] bool, whether the gradients were projected
  diagnostics: alignment.Alignment  # per tensor, of the retain and forget loss gradients


def gru(*, max_norm=None, reference_sign: bool = False) -> optax.GradientTransformationExtraArgs:
  """Gradient-rectified unlearning: ascend the forget loss without moving along the retain gradient.

  The equivalent gradient is -(g_f - (g_r.g_f / |g_r|^2) g_r) when the roles conflict, else -g_f.

  Args:
    max_norm: largest whole-model norm of the result, which is scaled down to it; None does not scale.
    reference_sign: whether g_r.g_f < 0 counts as a conflict, as in the published implementation.

  Returns:
    A `GradientTransformationExtraArgs` with `update(retain_grads, state, params=None, *,
    forget_grads)`, both gradients of the losses themselves (not negated).

  Raises:
    UserError: for a `max_norm` that is not above 0.

  Source: GRU: Mitigating the Trade-off between Unlearning and Retention (arXiv 2503.09117), as in
  the experiments of arXiv 2606.02119.
  """

  def combine(retain, forget, dot, retain_square, forget_square, conflict):
    del forget_square
    along_retain = jnp.where(conflict, dot / retain_square, 0)
    return jax.tree.map(lambda r, f: along_retain * r - f, retain, forget)

  return _projection("gru", combine, max_norm, reference_sign)


def pcgrad(*, max_norm=None, reference_sign: bool = False) -> optax.GradientTransformationExtraArgs:
  """PCGrad on the gradients of the two descent objectives, (g_r, -g_f).

  When the roles conflict, each gradient loses its component along the other. The result is the mean
  of the two gradients, projected or not.

  Args:
    max_norm: largest whole-model norm of the result, which is scaled down to it; None does not scale.
    reference_sign: whether g_r.g_f < 0 counts as a conflict, as in the published implementation.

  Returns:
    A `GradientTransformationExtraArgs` with `update(retain_grads, state, params=None, *,
    forget_grads)`, both gradients of the losses themselves (not negated).

  Raises:
    UserError: for a `max_norm` that is not above 0.

  Source: Gradient Surgery for Multi-Task Learning (arXiv 2001.06782).
  """

  def combine(retain, forget, dot, retain_square, forget_square, conflict):
    retain_factor = jnp.where(conflict, 1 + dot / retain_square, 1) / 2
    forget_factor = jnp.where(conflict, 1 + dot / forget_square, 1) / 2
    return jax.tree.map(lambda r, f: retain_factor * r - forget_factor * f, retain, forget)

  return _projection("pcgrad", combine, max_norm, reference_sign)


def _projection(name: str, combine, max_norm, reference_sign: bool) -> optax.GradientTransformationExtraArgs:
  """Builds the transformation around `combine`, which gets whole-model products and the conflict test."""
  if isinstance(max_norm, (int, float)) and not max_norm > 0:
    raise UserError(f"max_norm={max_norm!r} is out of range; give a number above 0, or None")

  def init_fn(params):
    return ConflictState(conflict=jnp.zeros([], jnp.bool_), diagnostics=alignment.zero_alignment(params))

  def update_fn(retain_grads, forget_grads, state):
    del state
    diagnostics = alignment.align(retain_grads, forget_grads)
    dot = jnp.sum(diagnostics.dot)
    retain_square = _floored_square(diagnostics.retain_norm)
    forget_square = _floored_square(diagnostics.forget_norm)
    conflict = dot < 0 if reference_sign else dot > 0
    updates = combine(retain_grads, forget_grads, dot, retain_square, forget_square, conflict)
    if max_norm is not None:
      updates = _scale_down(updates, max_norm)
    updates = jax.tree.map(lambda u, g: u.astype(g.dtype), updates, retain_grads)
    return updates, ConflictState(conflict=conflict, diagnostics=diagnostics)

  return pair.transformation(name, init_fn, update_fn)


def _floored_square(norm_T):
  """Squared norm of the whole model, with a floor that keeps quotients finite."""
  return jnp.maximum(jnp.sum(norm_T**2), _SQUARED_NORM_FLOOR)


def _scale_down(tree, max_norm):
  """Scales a tree to the whole-model norm `max_norm` if its norm is larger."""
  norm = optax.tree.norm(tree)
  too_long = norm > max_norm
  factor = jnp.where(too_long, max_norm / jnp.where(too_long, norm, 1), 1)
  return jax.tree.map(lambda x: x * factor, tree)
