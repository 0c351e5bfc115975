"""HAMU over a whole model, as an optax transformation of a retain and a forget gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from hamu_jax.transforms import alignment, pair
from hamu_jax.transforms.hamu_update import (
  NONFINITE,
  ON_INFEASIBLE,
  VARIANTS,
  as_vector,
  check_choice,
  check_not_negative,
  combine,
  effective_pair,
  is_zero_forget,
  like_tree,
  solve,
)
from hamu_jax.transforms.stop import Stop

SHARES = ("equal", "grad_norm", "exp_neg_dot")
SCOPES = ("tensor", "global")
CRITERIA = ("published", "descent")


class HamuDiagnostics(NamedTuple):
  """Diagnostics of one update; T blocks in tree-leaf order (one block with scope "global").

  The norms are those of the roles' own gradients in both variants, so that runs of all methods are
  comparable. Feasibility, threshold, radius and constraint are those of the solved optimization problem.
  """

  branch: jax.Array  # [T] int32, a name in BRANCHES
  infeasible: jax.Array  # [T] bool
  angle: jax.Array  # [T] between g_r and g_f, in degrees
  feasibility: jax.Array  # [T] c / (|g_f| R) after hamu-u's swap
  threshold: jax.Array  # [T] -c |g_r| / R after hamu-u's swap
  retain_norm: jax.Array  # [T]
  forget_norm: jax.Array  # [T]
  dot: jax.Array  # [T] g_r . g_f
  constraint: jax.Array  # [T] each block's share of the constraint
  radius: jax.Array  # [T] R
  stopping_rhs: jax.Array  # [] right-hand side of the aggregate criterion
  stopping_constraint: jax.Array  # [] sum of the shares
  stopping_margin: jax.Array  # [] stopping_constraint - stopping_rhs
  stopping_met: jax.Array  # [] bool, the margin is above 0
  feasible_ratio: jax.Array  # [] largest feasible constraint / learning rate, infinite at rate 0


class HamuState(NamedTuple):
  """State of `hamu`."""

  # `count` hides the method of tuples.
  count: jax.Array  # type: ignore[assignment]  # [] int32, updates applied, for schedules
  stop: jax.Array  # [] int32, a `Stop` code: why the last update is zero
  diagnostics: HamuDiagnostics  # of the last update, even if it was stopped


def hamu(
  learning_rate,
  constraint,
  *,
  variant: str = "hamu-q",
  radius=None,
  share: str = "grad_norm",
  scope: str = "tensor",
  normalize_share: bool = True,
  on_infeasible: str = "stop",
  stop_on_criterion: bool = False,
  criterion: str = "published",
  eps: float = 1e-12,
) -> optax.GradientTransformationExtraArgs:
  r"""HAMU: the best step for one role subject to guaranteed progress of the other.

  Each block (a tensor, or the whole model) takes the step of `hamu_update` with its share c_t of
  the constraint. The transformation returns the equivalent gradient -delta / learning_rate, so
  that `optax.chain(hamu(learning_rate, ...), optax.sgd(learning_rate))` changes the parameters by
  delta. A rate of 0 gives zeros. The aggregate criterion is met when

  .. math::
    \sum_t c_t > \sum_t R_t \sqrt{\|g_r\|^2 \|g_f\|^2 - (g_r^\top g_f)^2} \, / \, \|g_r\|

  All updates are zero if a block is infeasible under "stop", if the criterion is met under
  `stop_on_criterion`, or if a gradient is not finite. The count then does not advance, and the state
  holds the reason. The transformation does not end the run: the loop reads the code and ends it.

  The function is long because its docstring states every option.

  Args:
    learning_rate: scalar, traced value, or schedule of the count.
    constraint: c >= 0 for the whole model: scalar, traced value or schedule. For a ratio of the
      current rate pass the schedule `lambda count: ratio * learning_rate(count)`.
    variant: "hamu-q" or "hamu-u", see `hamu_update`.
    radius: R of every block: scalar, traced value or schedule. None is the learning-rate radius,
      learning_rate * |g_r| of the block after the variant's swap.
    share: how blocks share the constraint, c_t = c w_t / sum(w): "equal" w = 1 / T, "grad_norm"
      w = |g_r| |g_f| (equal if all are zero), "exp_neg_dot" w = exp(-g_r.g_f).
    scope: "tensor" (every tensor is a block) or "global" (the model is one block with all of c,
      whatever `share` is).
    normalize_share: whether w is divided by sum(w); "equal" is the same either way.
    on_infeasible: "stop", "project" or "exceed", see `hamu_update`.
    stop_on_criterion: whether the aggregate criterion stops. It is always in the diagnostics.
    criterion: "published", or "descent": a block with g_r.g_f <= 0 contributes R_t |g_f|, because
      with opposed gradients the objective falls for every c_t that the radius allows.
    eps: threshold of zero gradients and constraints, see `hamu_update`.

  Returns:
    A `GradientTransformationExtraArgs` with `update(retain_grads, state, params=None, *,
    forget_grads)`; its state is a `HamuState` of fixed shapes and dtypes.

  Raises:
    UserError: for an unknown choice or a number out of range.

  Source: Hardness-Aware Multi-Objective Unlearning (arXiv 2606.02119).
  """
  check_choice("variant", variant, VARIANTS)
  check_choice("share", share, SHARES)
  check_choice("scope", scope, SCOPES)
  check_choice("on_infeasible", on_infeasible, ON_INFEASIBLE)
  check_choice("criterion", criterion, CRITERIA)
  check_not_negative("learning_rate", learning_rate)
  check_not_negative("constraint", constraint)
  check_not_negative("radius", radius)
  arguments = _Arguments(
    learning_rate=learning_rate,
    constraint=constraint,
    variant=variant,
    radius=radius,
    share=share,
    scope=scope,
    normalize_share=normalize_share,
    on_infeasible=on_infeasible,
    stop_on_criterion=stop_on_criterion,
    criterion=criterion,
    eps=eps,
  )

  def init_fn(params):
    return HamuState(
      count=jnp.zeros([], jnp.int32),
      stop=jnp.asarray(Stop.NONE, jnp.int32),
      diagnostics=_zero_diagnostics(params, scope),
    )

  def update_fn(retain_grads, forget_grads, state):
    return _update(arguments, retain_grads, forget_grads, state)

  return pair.transformation("hamu", init_fn, update_fn, stops_nonfinite=True)


class _Arguments(NamedTuple):
  """The checked arguments of `hamu`."""

  learning_rate: Any
  constraint: Any
  variant: str
  radius: Any
  share: str
  scope: str
  normalize_share: bool
  on_infeasible: str
  stop_on_criterion: bool
  criterion: str
  eps: float


def _update(arguments: _Arguments, retain_grads, forget_grads, state: HamuState):
  """Computes the equivalent gradient and the next state."""
  blocks_of = jax.tree.leaves if arguments.scope == "tensor" else lambda tree: [as_vector(tree)]
  effective = effective_pair(blocks_of(retain_grads), blocks_of(forget_grads), arguments.variant)
  geometry, groups = alignment.measure_blocks(*effective)

  dtype = state.diagnostics.angle.dtype
  rate = _value_at(arguments.learning_rate, state.count, dtype)
  total = _value_at(arguments.constraint, state.count, dtype)
  radius_T = rate * geometry.retain_norm
  if arguments.radius is not None:
    radius_T = jnp.full_like(radius_T, _value_at(arguments.radius, state.count, dtype))
  share_T = _shares(geometry, arguments)
  constraint_T = total * share_T

  solution = solve(
    geometry,
    radius=radius_T,
    constraint=constraint_T,
    on_infeasible=arguments.on_infeasible,
    eps=arguments.eps,
  )
  diagnostics = _diagnostics(arguments, geometry, solution, radius_T, constraint_T, share_T, rate)
  stop = _stop(arguments, diagnostics, rate)

  moves = (stop == Stop.NONE) & (rate > 0)

  def moved():
    stacks = []
    for places, frame in groups:
      steps = jax.tree.map(lambda x_T, places=places: x_T[np.array(places)], solution.step)
      gradients = -jax.vmap(combine)(frame, steps) / jnp.where(moves, rate, 1)
      stacks.append(gradients.astype(frame.retain.dtype))
    return stacks

  def still():
    return [jnp.zeros_like(group.frame.retain) for group in groups]

  # With a selection instead, each tensor would combine its part of a stack in a kernel of its own.
  stacks = lax.cond(moves, moved, still)
  at_place: dict[int, jax.Array] = {}
  for group, stack in zip(groups, stacks, strict=True):
    at_place |= zip(group.places, stack, strict=True)
  updates = [at_place[place] for place in range(len(at_place))]
  if arguments.scope == "global":
    updates = jax.tree.leaves(like_tree(updates[0], retain_grads))
  updates = jax.tree.unflatten(
    jax.tree.structure(retain_grads),
    [u.astype(g.dtype) for u, g in zip(updates, jax.tree.leaves(retain_grads), strict=True)],
  )
  count = jnp.where(stop == Stop.NONE, optax.safe_increment(state.count), state.count)
  return updates, HamuState(count=count, stop=stop, diagnostics=diagnostics)


def _shares(geometry: alignment.Geometry, arguments: _Arguments):
  """The share of each block in the constraint, [T]; a single global block has all of it."""
  equal_T = jnp.full_like(geometry.cosine, 1 / geometry.cosine.size)
  if arguments.scope == "global" or arguments.share == "equal":
    return equal_T
  if arguments.share == "exp_neg_dot":
    if arguments.normalize_share:
      return jax.nn.softmax(-geometry.dot)
    # The weight saturates at the largest number instead of overflowing to infinity.
    return jnp.minimum(jnp.exp(-geometry.dot), jnp.finfo(equal_T.dtype).max)
  if not arguments.normalize_share:
    return geometry.retain_norm * geometry.forget_norm
  # The norms are relative to the largest ones, so that products of tiny or huge norms keep their proportions.
  weight_T = _relative(geometry.retain_norm) * _relative(geometry.forget_norm)
  weight = jnp.sum(weight_T)
  return jnp.where(weight == 0, equal_T, weight_T / jnp.where(weight == 0, 1, weight))


def _relative(norm_T):
  """Norms as fractions of the largest one."""
  largest = jnp.max(norm_T)
  return norm_T / jnp.where(largest == 0, 1, largest)


def _stopping_rhs(geometry: alignment.Geometry, radius_T, criterion: str):
  """The constraint above which the aggregate criterion is met."""
  reach_T = radius_T * geometry.forget_norm
  sideways_T = reach_T * geometry.sine
  if criterion == "descent":
    sideways_T = jnp.where(geometry.dot <= 0, reach_T, sideways_T)
  return jnp.sum(sideways_T)


def _feasible_ratio(geometry: alignment.Geometry, radius_T, share_T, rate, eps: float):
  """Largest constraint / learning rate that every block can meet with these shares.

  Block t can meet a constraint of R_t |g_f| (0 for a zero gradient), and at least `eps` whatever its
  gradients. Divided by its share, this bounds the whole constraint; the smallest bound counts. The ratio is
  infinite if no block has a share.
  """
  zero_forget_T = is_zero_forget(geometry.forget_norm, eps)
  limit_T = jnp.maximum(jnp.where(zero_forget_T, 0, radius_T * geometry.forget_norm), eps)
  free_T = share_T == 0
  quotient_T = jnp.where(free_T, jnp.inf, limit_T / jnp.where(free_T, 1, share_T))
  still = rate == 0
  return jnp.where(still, jnp.inf, jnp.min(quotient_T) / jnp.where(still, 1, rate))


def _diagnostics(
  arguments: _Arguments, geometry, solution, radius_T, constraint_T, share_T, rate
) -> HamuDiagnostics:
  """The diagnostics of one update, with the norms assigned to the roles' own gradients again."""
  norms = (geometry.retain_norm, geometry.forget_norm)
  retain_norm_T, forget_norm_T = norms[::-1] if arguments.variant == "hamu-u" else norms
  stopping_rhs = _stopping_rhs(geometry, radius_T, arguments.criterion)
  total = jnp.sum(constraint_T)
  return HamuDiagnostics(
    branch=solution.branch,
    infeasible=solution.infeasible,
    angle=geometry.angle,
    feasibility=solution.feasibility,
    threshold=solution.threshold,
    retain_norm=retain_norm_T,
    forget_norm=forget_norm_T,
    dot=geometry.dot,
    constraint=constraint_T,
    radius=radius_T,
    stopping_rhs=stopping_rhs,
    stopping_constraint=total,
    stopping_margin=total - stopping_rhs,
    stopping_met=total > stopping_rhs,
    feasible_ratio=_feasible_ratio(geometry, radius_T, share_T, rate, arguments.eps),
  )


def _zero_diagnostics(params, scope: str) -> HamuDiagnostics:
  """Diagnostics before the first update."""
  dtype = alignment.compute_dtype(params)
  blocks = len(jax.tree.leaves(params)) if scope == "tensor" else 1
  zero, zeros_T = jnp.zeros([], dtype), jnp.zeros([blocks], dtype)
  return HamuDiagnostics(
    branch=jnp.zeros([blocks], jnp.int32),
    infeasible=jnp.zeros([blocks], jnp.bool_),
    angle=zeros_T,
    feasibility=zeros_T,
    threshold=zeros_T,
    retain_norm=zeros_T,
    forget_norm=zeros_T,
    dot=zeros_T,
    constraint=zeros_T,
    radius=zeros_T,
    stopping_rhs=zero,
    stopping_constraint=zero,
    stopping_margin=zero,
    stopping_met=jnp.zeros([], jnp.bool_),
    feasible_ratio=zero,
  )


def _stop(arguments: _Arguments, diagnostics: HamuDiagnostics, rate):
  """The reason to stop; a reason that makes later ones unreliable comes first."""
  return jnp.select(
    [
      ~jnp.isfinite(rate) | jnp.any(diagnostics.branch == NONFINITE),
      jnp.any(diagnostics.infeasible) & (arguments.on_infeasible == "stop"),
      diagnostics.stopping_met & arguments.stop_on_criterion,
    ],
    [int(Stop.NONFINITE), int(Stop.INFEASIBLE), int(Stop.CRITERION)],
    int(Stop.NONE),
  ).astype(jnp.int32)


def _value_at(value, count, dtype):
  """A scalar, or the value of a schedule at this count."""
  return jnp.asarray(value(count) if callable(value) else value, dtype)
