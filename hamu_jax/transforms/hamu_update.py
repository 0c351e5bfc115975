"""The HAMU step on one block: the closed form of a linear program with a ball constraint."""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hamu_jax.errors import UserError
from hamu_jax.transforms import alignment

VARIANTS = ("hamu-q", "hamu-u")
ON_INFEASIBLE = ("stop", "project", "exceed")

# Names of `HamuUpdate.branch`; the first five have the codes of the published implementation.
BRANCHES = ("direct", "rectified", "colinear", "zero_forget_grad", "infeasible", "nonfinite")
DIRECT, RECTIFIED, COLINEAR, ZERO_FORGET_GRAD, INFEASIBLE, NONFINITE = range(len(BRANCHES))


class HamuUpdate(NamedTuple):
  """The step on one block, with the branch that produced it and diagnostics.

  Norms and dot product are those of the solved optimization problem. For hamu-u that is after the swap:
  `retain_norm` is then the norm of the forget gradient, and `forget_norm` that of the retain gradient.
  """

  delta: Any  # change of the weights, same structure and dtypes as the gradients
  branch: jax.Array  # [] int32, a name in BRANCHES
  infeasible: jax.Array  # [] bool, no step can meet the constraint, or none can be computed
  angle: jax.Array  # [] degrees between g_r and g_f, 90 when either is zero
  feasibility: jax.Array  # [] c / (|g_f| R), at most 1 when feasible; finite for zero gradients
  threshold: jax.Array  # [] -c |g_r| / R: the step is direct when g_r.g_f is at most this
  retain_norm: jax.Array  # [] |g_r|
  forget_norm: jax.Array  # [] |g_f|
  dot: jax.Array  # [] g_r . g_f


class Solution(NamedTuple):
  """The result of `solve`; scalars for one block, [T] for T blocks."""

  step: alignment.Frame  # coordinates of the step in the block's frame; zero for a nonfinite block
  branch: jax.Array  # as in HamuUpdate
  infeasible: jax.Array  # as in HamuUpdate
  feasibility: jax.Array  # as in HamuUpdate
  threshold: jax.Array  # as in HamuUpdate


def hamu_update(
  retain,
  forget,
  *,
  learning_rate,
  radius,
  constraint,
  variant: str = "hamu-q",
  use_lr_radius: bool = False,
  on_infeasible: str = "stop",
  eps: float = 1e-12,
) -> HamuUpdate:
  r"""The HAMU step on one block.

  .. math::
    \min_d \; g_r^\top d \quad \text{subject to} \quad g_f^\top d \ge c, \quad \|d\| \le R

  with, in this order,

  - zero forget gradient (|g_f|^2 < eps): direct if c is 0, else zero and flagged;
  - infeasible (R < c / |g_f|): see `on_infeasible`;
  - direct (R g_r.g_f <= -c |g_r|, g_r not zero): d = -R g_r / |g_r|;
  - colinear (g_p is rounding, or g_r is zero): d = c g_f / |g_f|^2;
  - rectified: d = c g_f / |g_f|^2 - sqrt(R^2 - c^2 / |g_f|^2) g_p / |g_p|,

  where g_p is the part of g_r orthogonal to g_f. Variant hamu-u is the same problem with
  (g_r, g_f) <- (-g_f, -g_r): it lowers the retain loss by at least c and raises the forget loss most.
  A NaN or an infinity in gradients, radius or constraint gives a zero step, which is flagged as infeasible
  with the branch nonfinite. The function is long because its docstring states the whole problem.

  Args:
    retain: gradient of the retain loss on this block: an array, or a pytree read as one vector.
    forget: gradient of the forget loss, same structure and shapes as `retain`.
    learning_rate: scalar, read only with `use_lr_radius`.
    radius: R, scalar; None with `use_lr_radius`.
    constraint: c >= 0, scalar, in units of loss; up to `eps` it counts as 0.
    variant: "hamu-q" (raise the forget loss by at least c, lower the retain loss most) or "hamu-u".
    use_lr_radius: whether R = learning_rate * |g_r| after the variant's swap, so that a step of plain
      gradient descent ends exactly on the ball.
    on_infeasible: "stop" (zero step), "project" (as far as R allows: R g_f / |g_f|) or "exceed"
      (c g_f / |g_f|^2 although it is longer than R, as published).
    eps: squared norm of a forget gradient, and constraint, below which each counts as zero.

  Returns:
    The `HamuUpdate`; its scalars have the gradients' dtype (at least float32).

  Raises:
    UserError: for an unknown variant or on_infeasible, no radius, or a number out of range.

  Source: Hardness-Aware Multi-Objective Unlearning (arXiv 2606.02119).
  """
  check_choice("variant", variant, VARIANTS)
  check_choice("on_infeasible", on_infeasible, ON_INFEASIBLE)
  check_not_negative("learning_rate", learning_rate)
  check_not_negative("constraint", constraint)
  if not use_lr_radius:
    if radius is None:
      raise UserError("radius=None needs use_lr_radius=True; give a radius, or set use_lr_radius")
    check_not_negative("radius", radius)

  effective = effective_pair(as_vector(retain), as_vector(forget), variant)
  geometry, frame = alignment.measure(*effective)
  dtype = geometry.cosine.dtype
  if use_lr_radius:
    radius = jnp.asarray(learning_rate, dtype) * geometry.retain_norm
  solution = solve(
    geometry,
    radius=jnp.asarray(radius, dtype),
    constraint=jnp.asarray(constraint, dtype),
    on_infeasible=on_infeasible,
    eps=eps,
  )
  # Gradients that are not finite have NaN directions, which stay NaN when multiplied by a coordinate of 0.
  delta = jnp.where(solution.branch == NONFINITE, 0, combine(frame, solution.step))
  return HamuUpdate(
    delta=like_tree(delta, retain),
    branch=solution.branch,
    infeasible=solution.infeasible,
    angle=geometry.angle,
    feasibility=solution.feasibility,
    threshold=solution.threshold,
    retain_norm=geometry.retain_norm,
    forget_norm=geometry.forget_norm,
    dot=geometry.dot,
  )


def solve(geometry: alignment.Geometry, *, radius, constraint, on_infeasible: str, eps: float) -> Solution:
  """Solves the problem of `hamu_update` for one block, or elementwise for [T] blocks.

  Args:
    geometry: geometry of the effective gradients, scalars or [T].
    radius: R, same shape and dtype as the geometry's fields.
    constraint: c, same shape and dtype.
    on_infeasible: as in `hamu_update`.
    eps: as in `hamu_update`.

  Returns:
    The `Solution`, whose fields have the shape of the geometry's.
  """
  constraint = jnp.maximum(constraint, 0)
  shortest = _shortest(geometry, radius, constraint, eps)
  branch = _branch(geometry, radius, constraint, shortest, eps)
  # The floors keep the diagnostics of zero gradients finite, so that they can be logged.
  floored_radius = jnp.maximum(radius, eps)
  return Solution(
    step=_coefficients(geometry, branch, radius, shortest, on_infeasible),
    branch=branch,
    infeasible=(branch == ZERO_FORGET_GRAD) | (branch == INFEASIBLE) | (branch == NONFINITE),
    feasibility=constraint / jnp.maximum(geometry.forget_norm, eps**0.5) / floored_radius,
    threshold=-constraint * jnp.maximum(geometry.retain_norm, eps) / floored_radius,
  )


def combine(frame: alignment.Frame, step: alignment.Frame):
  """Sum of the directions of `frame`, weighted by the scalar coordinates `step`."""
  terms = [coordinate * direction for coordinate, direction in zip(step, frame, strict=True)]
  return terms[0] + terms[1] + terms[2]


def as_vector(tree):
  """An array as it is, or the leaves of a pytree as one vector."""
  leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
  if len(leaves) == 1:
    return leaves[0]
  return jnp.concatenate([leaf.ravel() for leaf in leaves])


def like_tree(vector, tree):
  """The inverse of `as_vector`: a result in the structure, shapes and dtypes of `tree`."""
  leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
  ends = np.cumsum([leaf.size for leaf in leaves])
  parts = zip(jnp.split(vector.ravel(), ends[:-1]), leaves, strict=True)
  return jax.tree.unflatten(treedef, [p.reshape(x.shape).astype(x.dtype) for p, x in parts])


def effective_pair(retain, forget, variant: str):
  """The pair (g_r, g_f) of the optimization problem; for hamu-u it is (-g_f, -g_r)."""
  if variant == "hamu-u":
    return jax.tree.map(jnp.negative, forget), jax.tree.map(jnp.negative, retain)
  return retain, forget


def is_zero_forget(forget_norm, eps: float):
  """Whether a forget gradient of this norm counts as zero."""
  return forget_norm * forget_norm < eps


def check_choice(name: str, value, choices: tuple[str, ...]) -> None:
  """Raises a UserError unless `value` is one of `choices`."""
  if value not in choices:
    raise UserError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")


def check_not_negative(name: str, value) -> None:
  """Raises a UserError for a Python or NumPy number that is negative or not finite; accepts arrays."""
  if isinstance(value, numbers.Real) and not (math.isfinite(value) and float(value) >= 0):
    raise UserError(f"{name}={value!r} is out of range; give a finite number of at least 0")


def _shortest(geometry: alignment.Geometry, radius, constraint, eps: float):
  """c / |g_f|, the length of the shortest step that meets the constraint; 0 for a zero gradient.

  A constraint that counts as zero never makes a block infeasible; the step meets it as far as R allows.
  """
  is_zero = is_zero_forget(geometry.forget_norm, eps)
  length = jnp.where(is_zero, 0, constraint / jnp.where(is_zero, 1, geometry.forget_norm))
  return jnp.where(constraint <= eps, jnp.minimum(length, radius), length)


def _branch(geometry: alignment.Geometry, radius, constraint, shortest, eps: float):
  """The branch code of one block; the order of the cases is part of the definition."""
  finite = jnp.isfinite(geometry.retain_norm) & jnp.isfinite(geometry.forget_norm)
  finite &= jnp.isfinite(radius) & jnp.isfinite(constraint)
  zero_forget = is_zero_forget(geometry.forget_norm, eps)
  direct = radius * geometry.forget_norm * geometry.cosine <= -constraint
  return jnp.select(
    [
      ~finite,
      zero_forget & (constraint <= eps),
      zero_forget,
      shortest > radius,
      direct & (geometry.retain_norm > 0),
      geometry.colinear,
    ],
    [NONFINITE, DIRECT, ZERO_FORGET_GRAD, INFEASIBLE, DIRECT, COLINEAR],
    RECTIFIED,
  ).astype(jnp.int32)


def _coefficients(geometry: alignment.Geometry, branch, radius, shortest, on_infeasible: str):
  """The coordinates of the step in the frame of the gradients."""
  rectified = branch == RECTIFIED
  # (R - a)(R + a) keeps the digits that R^2 - a^2 cancels; other branches read a constant.
  square = jnp.where(rectified, (radius - shortest) * (radius + shortest), 1)
  sideways = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
  fallback = {"stop": jnp.zeros_like(radius), "project": radius, "exceed": shortest}[on_infeasible]

  along_forget = jnp.select([rectified | (branch == COLINEAR), branch == INFEASIBLE], [shortest, fallback], 0)
  return alignment.Frame(
    retain=jnp.where(branch == DIRECT, -radius, 0),
    forget=along_forget,
    orthogonal=jnp.where(rectified, -sideways / jnp.where(rectified, geometry.sine, 1), 0),
  )
