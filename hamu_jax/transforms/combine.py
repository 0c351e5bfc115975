"""Linear combinations of the gradients, which do not depend on the gradients' geometry."""

from typing import NamedTuple

import jax
import optax

from hamu_jax.errors import UserError
from hamu_jax.transforms import alignment, pair


class AlignmentState(NamedTuple):
  """State of `average` and `add`."""

  diagnostics: alignment.Alignment  # per tensor, of the last update's gradients as handed in


def plain() -> optax.GradientTransformationExtraArgs:
  """Passes the gradient of a single role through.

  Returns:
    A `GradientTransformationExtraArgs` with `update(retain_grads, state, params=None, *,
    forget_grads=None)`; exactly one of the two gradients must not be None.
  """

  def update_fn(retain_grads, state, params=None, *, forget_grads=None, **extra_args):
    del params, extra_args
    if (retain_grads is None) == (forget_grads is None):
      given = "no gradient" if retain_grads is None else "both gradients"
      raise UserError(f"plain takes the gradient of one role, got {given}; for two use average or add")
    return (forget_grads if retain_grads is None else retain_grads), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def average() -> optax.GradientTransformationExtraArgs:
  """Computes (g_r + g_f) / 2; the gradients include the sign and coefficients of their objectives.

  Returns:
    A `GradientTransformationExtraArgs` with `update(retain_grads, state, params=None, *,
    forget_grads)`.
  """
  return _linear("average", 0.5)


def add() -> optax.GradientTransformationExtraArgs:
  """Computes g_r + g_f; the gradients include the sign and coefficients of their objectives.

  Returns:
    A `GradientTransformationExtraArgs` with `update(retain_grads, state, params=None, *,
    forget_grads)`.
  """
  return _linear("add", 1.0)


def _linear(name: str, factor: float) -> optax.GradientTransformationExtraArgs:
  """Computes factor * (g_r + g_f)."""

  def init_fn(params):
    return AlignmentState(diagnostics=alignment.zero_alignment(params))

  def update_fn(retain_grads, forget_grads, state):
    del state
    updates = jax.tree.map(lambda r, f: factor * (r + f), retain_grads, forget_grads)
    return updates, AlignmentState(diagnostics=alignment.align(retain_grads, forget_grads))

  return pair.transformation(name, init_fn, update_fn)
