r"""Predicts from two gradients how hard forgetting is and what a step would cost, before it is taken.

All functions are pure and jittable. `hamu_jax.analysis.preview` computes the gradients, and
`python -m hamu_jax.analysis.hardness` prints the results. There are T blocks in tree-leaf order: the tensors,
or with scope "global" the whole model as one block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hamu_jax import transforms
from hamu_jax.transforms import alignment
from hamu_jax.transforms.hamu_update import as_vector, effective_pair, is_zero_forget, solve

Tree = Any
# Angles in degrees: below the first forgetting is hard, from the second on it is easy.
HARD, EASY = 60, 85
# The default `eps` of `transforms.hamu`.
_EPS = 1e-12


class Hardness(NamedTuple):
  """How hard two gradients are to reconcile, and the step that HAMU takes with them.

  Ratios are values of `config.method.constraint_ratio`: the constraint on the whole model over the learning
  rate.
  """

  angle: jax.Array  # [T] degrees; at 0, a step that lowers the retain loss lowers the forget loss as well
  retain_norm: jax.Array  # [T] |g_r|
  forget_norm: jax.Array  # [T] |g_f|
  feasible_ratio: jax.Array  # [T] largest ratio of which the block can meet its share
  free_ratio: jax.Array  # [T] largest ratio at which the loss of the block's first role does not get worse
  infeasible: jax.Array  # [T] bool, whether the block cannot meet its share of the given constraint
  branch: jax.Array  # [T] int32, a name in BRANCHES
  progress: jax.Array  # [T] of the first role: 1 as by plain descent in the same radius, negative if worse
  retain_weight: jax.Array  # [T] a in the step d = learning_rate (-a g_r + b g_f)
  forget_weight: jax.Array  # [T] b in that step
  stopping_ratio: jax.Array  # [] largest ratio at which HAMU's aggregate criterion is not met


def hardness(
  retain_grads: Tree,
  forget_grads: Tree,
  *,
  learning_rate,
  constraint,
  variant: str = "hamu-q",
  radius=None,
  share: str = "grad_norm",
  scope: str = "tensor",
  normalize_share: bool = True,
  on_infeasible: str = "stop",
  criterion: str = "published",
) -> Hardness:
  r"""Measures how hard the constraint is for two gradients, block by block, without taking a step.

  With the block's share :math:`s_t` of the constraint, its radius :math:`R_t` and the angle
  :math:`\theta_t` between its gradients, the constraint :math:`c` has the feasibility
  :math:`f_t = c s_t / (R_t \|g_f\|)`; the block can meet it up to :math:`f_t = 1`. Up to there, HAMU's step
  makes

  .. math::
    p_t = \frac{-g_r^\top d}{R_t \|g_r\|} =
      \begin{cases} 1 & \cos \theta_t \le -f_t \\ \sin(\theta_t - \arcsin f_t) & \text{else} \end{cases}

  of the progress of plain descent. This is not negative up to :math:`f_t = \sin \theta_t`, or 1 for
  :math:`\theta_t \ge 90°`; up to there the constraint is free. For hamu-u it is the progress of the forget
  loss, and the gradients are swapped as in `hamu_update`.

  Args:
    retain_grads: gradients of the retain loss as passed to the transform: masked and clipped.
    forget_grads: gradients of the forget loss, same structure and shapes.
    learning_rate: scalar, above 0.
    constraint: c >= 0, scalar, for the whole model.
    variant: "hamu-q" or "hamu-u".
    radius: R of every block; None is the learning-rate radius.
    share: how blocks share the constraint, see `transforms.hamu`.
    scope: "tensor" or "global", see `transforms.hamu`.
    normalize_share: whether the shares add up to the constraint.
    on_infeasible: treatment of an infeasible block, see `transforms.hamu`.
    criterion: the aggregate criterion, see `transforms.hamu`.

  Returns:
    The `Hardness`. It is finite for zero gradients, except that a block without a share of the constraint
    has infinite ratios.

  Raises:
    UserError: see `transforms.hamu`.

  Source: Hardness-Aware Multi-Objective Unlearning (arXiv 2606.02119) for the step and its criterion.
  """
  options = {
    "variant": variant,
    "radius": radius,
    "share": share,
    "scope": scope,
    "normalize_share": normalize_share,
    "on_infeasible": on_infeasible,
    "criterion": criterion,
  }
  seen = _diagnostics(retain_grads, forget_grads, learning_rate, options)
  share_T, radius_T = seen.constraint, seen.radius

  blocks_of = jax.tree.leaves if scope == "tensor" else lambda tree: [as_vector(tree)]
  effective = effective_pair(blocks_of(retain_grads), blocks_of(forget_grads), variant)
  geometry, _ = alignment.measure_blocks(*effective)
  solution = solve(
    geometry, radius=radius_T, constraint=constraint * share_T, on_infeasible=on_infeasible, eps=_EPS
  )

  reach_T = jnp.where(is_zero_forget(geometry.forget_norm, _EPS), 0, radius_T * geometry.forget_norm)
  free_T = jnp.where(geometry.dot <= 0, 1, geometry.sine)

  def as_ratio(limit_T):
    # Any block meets a constraint that counts as zero.
    limit_T = jnp.maximum(limit_T, _EPS)
    return _divide(limit_T, share_T * learning_rate, jnp.inf)

  ahead_T, weights = _of_step(solution.step, geometry, learning_rate)
  retain_weight_T, forget_weight_T = weights[::-1] if variant == "hamu-u" else weights
  return Hardness(
    angle=seen.angle,
    retain_norm=seen.retain_norm,
    forget_norm=seen.forget_norm,
    feasible_ratio=as_ratio(reach_T),
    free_ratio=as_ratio(reach_T * free_T),
    infeasible=solution.infeasible,
    branch=solution.branch,
    progress=_divide(-ahead_T, radius_T, 0),
    retain_weight=retain_weight_T,
    forget_weight=forget_weight_T,
    stopping_ratio=_divide(seen.stopping_rhs, seen.stopping_constraint * learning_rate, jnp.inf),
  )


def first_order_change(gradient: Tree, update: Tree) -> jax.Array:
  """First-order change of a loss by an update: `g . u` of each tensor, [T].

  Args:
    gradient: g, gradient of the loss.
    update: u, change of the parameters, same structure and shapes.
  """
  dtype = alignment.compute_dtype(gradient)
  dots = [
    jnp.sum(g.astype(dtype) * u.astype(dtype))
    for g, u in zip(jax.tree.leaves(gradient), jax.tree.leaves(update), strict=True)
  ]
  return jnp.stack(dots)


def _diagnostics(retain_grads: Tree, forget_grads: Tree, learning_rate, options):
  """Diagnostics of `transforms.hamu` for a constraint of 1, so that the constraints are the shares."""
  transform = transforms.hamu(learning_rate, 1.0, **options, eps=_EPS)
  _, state = transform.update(retain_grads, transform.init(retain_grads), forget_grads=forget_grads)
  return state.diagnostics


def _of_step(step, geometry: alignment.Geometry, learning_rate):
  """A step's part along the first gradient, and its weights of both, each [T]."""
  # The frame has the unit vectors r and f, and o = r - cos f, with r.o = sin^2 and f.o = 0.
  ahead_T = step.retain + step.forget * geometry.cosine + step.orthogonal * geometry.sine**2
  first_T = _divide(-(step.retain + step.orthogonal), geometry.retain_norm * learning_rate, 0)
  second_T = _divide(step.forget - step.orthogonal * geometry.cosine, geometry.forget_norm * learning_rate, 0)
  return ahead_T, (first_T, second_T)


def _divide(numerator, denominator, otherwise):
  """The quotient, or `otherwise` where the denominator is zero."""
  is_zero = denominator == 0
  return jnp.where(is_zero, otherwise, numerator / jnp.where(is_zero, 1, denominator))
