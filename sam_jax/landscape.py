"""Loss landscapes: the loss on a plane through a model's parameters, and how flat it is.

Source: Li et al., Visualizing the Loss Landscape of Neural Nets (arXiv 1712.09913); the flatness
numbers are those of Sharpness-Aware Machine Unlearning (arXiv 2506.13715).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from numpy.typing import ArrayLike

Tree = Any
NORMALIZATIONS = ("filter", "tensor")
# Tolerances of the stability profile, as shares of the loss in the middle.
PROFILE = (0.1, 0.25, 0.5, 0.75)


class Flatness(NamedTuple):
  """Flatness of a grid of losses."""

  variability: float  # population standard deviation; lower is flatter
  gradient: float  # mean length of the gradient with respect to the grid index; lower is flatter
  basin: float  # % of the grid within half a standard deviation of the middle; higher is flatter
  profile: tuple[float, ...]  # % of the grid within each of PROFILE times the loss in the middle


def directions(params: Tree, key: jax.Array, *, normalization: str = "filter") -> tuple[Tree, Tree]:
  """Two random directions through a model, scaled to its weights; see `scale_draws`.

  Args:
    params: Pytree of arrays.
    key: Random key of the two standard normal draws.
    normalization: "filter" or "tensor".

  Returns:
    Two pytrees of the structure, shapes and dtypes of `params`.

  Raises:
    ValueError: for an unknown normalization.
  """
  vector, restore = ravel_pytree(params)
  first, second = jax.random.normal(key, (2, vector.size), vector.dtype)
  return scale_draws(params, restore(first), restore(second), normalization=normalization)


def scale_draws(
  params: Tree, first: Tree, second: Tree, *, normalization: str = "filter"
) -> tuple[Tree, Tree]:
  r"""Scales two random draws to a model's weights, so that models of different scales are comparable.

  The second draw is made orthogonal to the first, tensor by tensor. Then "filter" gives each filter of the
  draws the length of the filter of the weights,

  .. math::
    d_{ij} \leftarrow \frac{d_{ij}}{|d_{ij}|} |w_{ij}|

  where a filter consists of the weights of one output: an index of the last axis of a kernel [H, W, I, O] or
  [I, O]. Biases and norm affines, which have fewer than two axes, are not moved, as in Li et al.'s own
  figures. (The two directions are no longer exactly orthogonal if their filters are rescaled differently.)

  "tensor" is what the sharpness paper's code calls filter normalization. Each direction is divided
  by its norm over the whole model. Then every tensor of two or more axes gets the length of its
  weights; the others keep their small values, and so do tensors whose weights are all zero.
  Large and small filters of a tensor are then moved by the same length, so that a network whose filters
  differ much in scale looks sharper than it is.

  Args:
    params: Pytree of arrays.
    first: Standard normal draw, same structure and shapes as `params`.
    second: Another such draw.
    normalization: "filter" or "tensor".

  Returns:
    Two pytrees of the same structure.

  Raises:
    ValueError: for an unknown normalization.
  """
  if normalization not in NORMALIZATIONS:
    raise ValueError(f"normalization={normalization!r}: choose from {', '.join(NORMALIZATIONS)}")
  scale = _by_filter if normalization == "filter" else _by_tensor
  return scale(params, first), scale(params, jax.tree.map(_orthogonal, second, first))


def loss_grid(
  loss_fn: Callable[[Tree], jax.Array],
  params: Tree,
  plane: tuple[Tree, Tree],
  alphas: ArrayLike,
  betas: ArrayLike,
) -> jax.Array:
  r"""Losses :math:`L(w + \alpha_i d_1 + \beta_j d_2)`, all in one scanned program.

  The points are scanned, not vmapped, because a batch of examples fills a device, and a scan needs the memory
  of only one moved copy of the weights. To compile once for several models, jit a function that takes the
  parameters and the data and calls this one.

  Args:
    loss_fn: parameters -> scalar loss; models with batch norm must be in evaluation mode.
    params: w, pytree of arrays, the middle of the plane.
    plane: The two `directions`.
    alphas: [A] coordinates along the first direction.
    betas: [B] coordinates along the second direction.

  Returns:
    [B, A] losses, in the dtype of the loss.
  """
  alphas, betas = jnp.asarray(alphas), jnp.asarray(betas)

  def loss(point):
    alpha, beta = point
    moved = jax.tree.map(
      lambda w, d, e: w + alpha.astype(w.dtype) * d + beta.astype(w.dtype) * e, params, *plane
    )
    return loss_fn(moved)

  points_BxA = jnp.meshgrid(alphas, betas)
  losses = lax.map(loss, tuple(coordinate.ravel() for coordinate in points_BxA))
  return losses.reshape(len(betas), len(alphas))


def flatness(losses: ArrayLike) -> Flatness:
  r"""Flatness of a grid of losses around its middle.

  Let :math:`L_c` be the loss in the middle, :math:`\sigma` the standard deviation over the grid, and
  :math:`\partial_i, \partial_j` numeric gradients at unit spacing (central, one-sided at the edges). The
  variability is :math:`\sigma`. The gradient is
  :math:`\mathrm{mean}\sqrt{(\partial_i L)^2 + (\partial_j L)^2}`, which halves if the same range has twice
  the points. The basin is :math:`\mathrm{mean}[|L - L_c| \le \sigma / 2]`, and the profile is
  :math:`\mathrm{mean}[|L - L_c| \le t L_c]` for each t of `PROFILE`, both in percent.

  Args:
    losses: [B, A] losses; both sizes are odd and at least 3, so that the model itself is in the middle.

  Returns:
    The `Flatness`.

  Raises:
    ValueError: for a grid of another shape.
  """
  losses_BxA = np.asarray(losses, np.float64)
  if losses_BxA.ndim != 2 or any(size < 3 or size % 2 == 0 for size in losses_BxA.shape):
    raise ValueError(
      f"flatness: the grid has shape {losses_BxA.shape}; give two odd sizes of at least 3, "
      "so that the model lies in the middle"
    )
  middle = losses_BxA[losses_BxA.shape[0] // 2, losses_BxA.shape[1] // 2]
  away_BxA = np.abs(losses_BxA - middle)
  variability = losses_BxA.std()

  def percent_within(distance):
    return float(100 * np.mean(away_BxA <= distance))

  return Flatness(
    variability=float(variability),
    gradient=float(np.mean(np.hypot(*np.gradient(losses_BxA)))),
    basin=percent_within(0.5 * variability),
    profile=tuple(percent_within(share * middle) for share in PROFILE),
  )


def _orthogonal(tensor: jax.Array, to: jax.Array) -> jax.Array:
  return tensor - jnp.sum(tensor * to) / jnp.sum(to * to) * to


def _by_filter(params: Tree, direction: Tree) -> Tree:
  def scale(weights, tensor):
    if weights.ndim < 2:
      return jnp.zeros_like(tensor)
    axes = tuple(range(weights.ndim - 1))
    return tensor * _ratio(_norm(weights, axes), _norm(tensor, axes))

  return jax.tree.map(scale, params, direction)


def _by_tensor(params: Tree, direction: Tree) -> Tree:
  whole = jnp.sqrt(sum(jnp.sum(jnp.square(tensor)) for tensor in jax.tree.leaves(direction)))

  def scale(weights, tensor):
    if weights.ndim < 2:
      return tensor / whole
    size, length = _norm(weights, None), _norm(tensor, None)
    return tensor * jnp.where(size > 0, _ratio(size, length), 1 / whole)

  return jax.tree.map(scale, params, direction)


def _norm(tensor: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
  return jnp.sqrt(jnp.sum(jnp.square(tensor), axes, keepdims=True))


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  """The quotient, or zero where the denominator is zero."""
  return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)
