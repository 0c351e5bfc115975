"""What all transformations of two gradients share: their arguments, and their place in optax's wrappers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hamu_jax.errors import UserError
from sam_jax import wrappers

Tree = Any

_REMEDIES = {
  wrappers.ACCUMULATES: "would average the retain gradients alone; average both gradients and call update "
  "once, or give the optimizer to it: optax.chain({name}(...), optax.MultiSteps(optimizer, ...))",
  wrappers.SKIPS: "would look at the retain gradient alone; give the optimizer to it: "
  "optax.chain({name}(...), optax.apply_if_finite(optimizer, ...))",
}


def transformation(
  name: str,
  init: Callable[[Tree], Any],
  update: Callable[[Tree, Tree, Any], tuple[Tree, Any]],
  *,
  stops_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Makes a transformation with `update(retain_grads, state, params=None, *, forget_grads)`.

  Under `optax.masked`, `optax.partition` or `optax.multi_transform`, it sees the unmasked tensors of both
  gradients, and what it says of the whole model holds for these.

  Args:
    name: name of the transformation, for error messages.
    init: params -> state.
    update: (retain gradients, forget gradients, state) -> (updates, state), for at least one tensor.
    stops_nonfinite: whether a gradient that is not finite gives zero updates.

  Returns:
    The transformation. If all tensors are masked, the state stays as it is.

  Raises:
    UserError: from `update`, if a gradient is missing, not real, or differs from the other in structure or
      shape, or inside a wrapper that treats the retain gradient alone (`optax.MultiSteps`, and
      `optax.apply_if_finite` unless `stops_nonfinite`).
  """
  refused = (wrappers.ACCUMULATES,) if stops_nonfinite else tuple(_REMEDIES)

  def update_fn(retain_grads, state, params=None, *, forget_grads=None, **extra_args):
    del params, extra_args
    if wrapper := wrappers.surrounding(refused):
      raise UserError(f"{name} inside optax.{wrapper}, which {_REMEDIES[wrapper].format(name=name)}")
    if retain_grads is None or forget_grads is None:
      raise UserError(
        f"{name} takes the gradients of both roles; call update(retain_grads, state, forget_grads=...)"
      )
    forget_grads = _masked_alike(retain_grads, forget_grads)
    _check(name, retain_grads, forget_grads)
    if not jax.tree.leaves(retain_grads):
      return retain_grads, state
    return update(retain_grads, forget_grads, state)

  return optax.GradientTransformationExtraArgs(init, update_fn)


def _masked_alike(retain: Tree, forget: Tree) -> Tree:
  """Masks the forget gradient where the retain gradient is masked; wrappers leave extra arguments whole."""
  if not wrappers.any_masked(retain):
    return forget
  return jax.tree.map(
    lambda r, f: r if wrappers.is_masked(r) else f, retain, forget, is_leaf=wrappers.is_masked
  )


def _check(name: str, retain: Tree, forget: Tree) -> None:
  if jax.tree.map(jnp.shape, retain) != jax.tree.map(jnp.shape, forget):
    raise UserError(
      f"{name}: the retain and the forget gradients differ in structure or shapes; give those of one model"
    )
  for leaf in (*jax.tree.leaves(retain), *jax.tree.leaves(forget)):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      raise UserError(f"{name}: a gradient is of type {jnp.result_type(leaf)}; give real gradients")
