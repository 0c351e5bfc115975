"""Sharpness-aware minimisation, as a wrapper of gradient functions and as an optax transformation.

With clean gradient g0 at parameters w, both of the whole model:

    n = |g0|,  e = rho g0 / (n + 1e-12)                        (adaptive: n = | |w| g0 |, e times w^2)
    g1 = gradient at w + e
    result = g0 + s lamb (g1 - g0),  s = +1 for mode "min", -1 for mode "max"

`lamb = 1` in mode "min" is SAM itself; `lamb = 0` or `rho = 0` is the plain gradient. Mode "max" mirrors
the result about g0, so that descent seeks sharp instead of flat regions.

Source: Foret et al., Sharpness-Aware Minimization (arXiv 2010.01412); Kwon et al., ASAM (arXiv
2102.11600); Sharpness-Aware Machine Unlearning (arXiv 2506.13715) for lamb and mode.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_jax import wrappers

Tree = Any
MODES = ("min", "max")
_EPS = 1e-12


def perturbation(params: Tree, gradients: Tree, *, rho, adaptive: bool = False) -> Tree:
  """The step e to the point at which the sharpness-aware gradient is taken.

  `e = rho g / (|g| + 1e-12)`, or adaptive `e = rho w^2 g / (| |w| g | + 1e-12)`. The norm of e, or of e / |w|
  in the adaptive case, is rho. A zero gradient gives zero.

  Args:
    params: w, pytree of arrays.
    gradients: g, same structure and shapes.
    rho: radius of the perturbation; scalar, may be traced.
    adaptive: whether the ball is scaled by the magnitude of each weight.

  Returns:
    e, same structure, shapes and dtypes as `params`.
  """
  scaled = jax.tree.map(lambda w, g: jnp.abs(w) * g, params, gradients) if adaptive else gradients
  factor = rho / (_norm(scaled) + _EPS)

  def one(w, g):
    # In 16 bits the factor of a zero or tiny gradient would be infinite.
    step = factor * g.astype(factor.dtype)
    return (jnp.square(w) * step if adaptive else step).astype(w.dtype)

  return jax.tree.map(one, params, gradients)


def sharpness_aware(
  grad_fn: Callable[[Tree], Any],
  *,
  rho,
  adaptive: bool = False,
  lamb=1.0,
  mode: str = "min",
  has_aux: bool = False,
  direction: Callable[[Any], Tree] | None = None,
  perturbed_grad_fn: Callable[[Tree], Any] | None = None,
) -> Callable[[Tree], Any]:
  """Makes a gradient function sharpness-aware.

  Args:
    grad_fn: params -> gradients, or (gradients, auxiliary data) with `has_aux`. The gradients have the
      structure of params, unless `direction` is given.
    rho: radius of the perturbation; a scalar of at least 0, may be traced.
    adaptive: see `perturbation`.
    lamb: weight of the difference to the clean gradient; may be traced.
    mode: "min" or "max".
    has_aux: whether `grad_fn` returns auxiliary data. Those of the clean point are returned.
    direction: gradients -> the gradient that defines the perturbation, for several objectives with one
      perturbed point. None takes the gradients themselves.
    perturbed_grad_fn: gradient function for the perturbed point, for objectives with a part (such as an L1
      penalty) that enters only there. None takes `grad_fn`.

  Returns:
    params -> the result of `grad_fn` with sharpness-aware gradients. Each call evaluates two gradients.

  Raises:
    ValueError: for a negative rho or an unknown mode.
  """
  sign = _sign(mode)
  _check_rho(rho)
  perturbed_grad_fn = perturbed_grad_fn or grad_fn

  def sharp(params):
    clean, aux = grad_fn(params) if has_aux else (grad_fn(params), None)
    leading = clean if direction is None else direction(clean)
    moved = optax.apply_updates(params, perturbation(params, leading, rho=rho, adaptive=adaptive))
    perturbed = perturbed_grad_fn(moved)
    if has_aux:
      perturbed, _ = perturbed
    mixed = _mix(clean, perturbed, sign * lamb)
    return (mixed, aux) if has_aux else mixed

  return sharp


def sam(
  base: optax.GradientTransformation, *, rho, adaptive: bool = False, lamb=1.0, mode: str = "min"
) -> optax.GradientTransformationExtraArgs:
  """An optimizer that steps along the sharpness-aware gradient.

  `update(gradients, state, params, *, grad_fn)` takes the clean gradients at `params` and a function
  params -> gradients for the perturbed point; `base` then steps from `params` itself.

  Args:
    base: optimizer that receives the sharpness-aware gradients.
    rho: radius of the perturbation; a scalar of at least 0, may be traced.
    adaptive: see `perturbation`.
    lamb: weight of the difference to the clean gradient; may be traced.
    mode: "min" or "max".

  Returns:
    A `GradientTransformationExtraArgs` with the state of `base`.

  Raises:
    ValueError: for a negative rho or an unknown mode. `update` raises it if params or grad_fn is missing.

  Example:
    >>> optimizer = sam(optax.sgd(0.1, momentum=0.9), rho=0.05)
    >>> gradients = jax.grad(loss)(params)
    >>> updates, state = optimizer.update(gradients, state, params, grad_fn=jax.grad(loss))
  """
  _sign(mode)
  _check_rho(rho)
  base = optax.with_extra_args_support(base)

  def update_fn(gradients, state, params=None, *, grad_fn=None, **extra_args):
    _check_wrappers(gradients)
    if params is None or grad_fn is None:
      missing = "params" if params is None else "grad_fn"
      raise ValueError(
        f"sam: update needs {missing}; call update(gradients, state, params, grad_fn=...) with a "
        "function params -> gradients"
      )
    sharp = sharpness_aware(
      lambda point: gradients,
      rho=rho,
      adaptive=adaptive,
      lamb=lamb,
      mode=mode,
      perturbed_grad_fn=grad_fn,
    )
    return base.update(sharp(params), state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(base.init, update_fn)


def _mix(clean: Tree, perturbed: Tree, weight) -> Tree:
  """`clean + weight (perturbed - clean)`, in the dtype of the gradients."""

  def one(g0, g1):
    scale = jnp.asarray(weight, g0.dtype)
    return g0 + scale * (g1 - g0)

  return jax.tree.map(one, clean, perturbed)


def _norm(tree: Tree) -> jax.Array:
  """Euclidean norm of the whole tree, in at least float32, without overflow or underflow of squares."""
  leaves = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in jax.tree.leaves(tree)]
  peak = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves]))
  scale = jnp.where(peak == 0, 1, peak)
  return scale * jnp.sqrt(sum(jnp.sum(jnp.square(leaf / scale)) for leaf in leaves))


def _sign(mode: str) -> int:
  if mode not in MODES:
    raise ValueError(f"mode={mode!r}: choose from {', '.join(MODES)}")
  return 1 if mode == "min" else -1


def _check_rho(rho) -> None:
  """Refuses a negative or NaN radius, if it is not traced."""
  if not isinstance(rho, jax.core.Tracer) and not rho >= 0:
    raise ValueError(f"rho={rho!r}: choose a radius of the perturbation of at least 0")


def _check_wrappers(gradients: Tree) -> None:
  """Refuses wrappers that act on the clean gradient alone."""
  masked = wrappers.any_masked(gradients)
  wrapper = "masked" if masked else wrappers.surrounding((wrappers.ACCUMULATES, wrappers.SKIPS))
  if wrapper is not None:
    raise ValueError(
      f"sam inside optax.{wrapper}, which acts on the clean gradient alone, not on that of grad_fn at the "
      f"perturbed point; wrap the optimizer inside: sam(optax.{wrapper}(optimizer, ...), rho=...)"
    )
