"""How two gradients lie to each other: norms, angle and the plane they span.

Everything that looks at a retain and a forget gradient together measures them here, so that the
angle in a log, the branch of HAMU and an alignment plot are the same numbers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Geometry(NamedTuple):
  """Norms and angle of two gradients; scalars for one block, [T] for T blocks."""

  retain_norm: jax.Array  # |g_r|
  forget_norm: jax.Array  # |g_f|
  cosine: jax.Array  # 0 when either gradient is zero
  sine: jax.Array  # |Frame.orthogonal|, never negative
  colinear: jax.Array  # bool, the sine is no more than rounding; true when g_r is zero

  @property
  def dot(self) -> jax.Array:
    """g_r . g_f."""
    return self.cosine * self.retain_norm * self.forget_norm

  @property
  def angle(self) -> jax.Array:
    """Angle between the gradients in degrees, 90 when either is zero.

    From both sine and cosine: an arc cosine alone loses half the digits near 0 and 180 degrees.
    """
    sine = jnp.where(self.retain_norm == 0, 1, self.sine)
    return jnp.degrees(jnp.arctan2(sine, self.cosine))


class Frame(NamedTuple):
  """The directions of one block's gradients, or coordinates along them.

  Directions have the shape of the block, and that of a zero gradient is zero.
  """

  retain: jax.Array  # g_r / |g_r|
  forget: jax.Array  # g_f / |g_f|
  orthogonal: jax.Array  # g_r / |g_r| less its component along g_f


class Group(NamedTuple):
  """Blocks of one shape and dtype, n of T."""

  places: tuple[int, ...]  # which of the T blocks they are
  frame: Frame  # [n, ...] each


class Alignment(NamedTuple):
  """Diagnostics of a pair of gradients, one entry a tensor in tree-leaf order.

  Of the gradients as they were handed to the transform, with the sign and coefficient of their
  objective: 0 degrees means that descending one descends the other.
  """

  angle: jax.Array  # [T] degrees
  retain_norm: jax.Array  # [T]
  forget_norm: jax.Array  # [T]
  dot: jax.Array  # [T] g_r . g_f


def compute_dtype(tree) -> jnp.dtype:
  """The dtype in which a tree's norms and dot products are computed: its own, at least float32."""
  return jnp.promote_types(jnp.result_type(*jax.tree.leaves(tree)), jnp.float32)


def measure(retain, forget) -> tuple[Geometry, Frame]:
  """Measures two gradients of one block.

  Each vector is scaled by its largest entry first, so that squares neither underflow nor overflow,
  and the orthogonal part is orthogonalised twice: the first pass leaves a residue along the forget
  gradient that grows with the size of the tensor, the second leaves only the rounding of single
  entries. Gradients count as colinear when the sine is at most 64 machine epsilons (the root of one
  for 16-bit inputs): below it, the direction of the orthogonal part is noise, and what a step along
  it could gain is at most that fraction of `radius * |g_r|`.

  Args:
    retain: g_r, an array of any shape.
    forget: g_f, same shape as `retain`.

  Returns:
    The `Geometry` of scalars and the `Frame`, in the inputs' dtype (float32 for 16-bit inputs).
  """
  dtype = compute_dtype((retain, forget))
  epsilon = max(float(jnp.finfo(x.dtype).eps) for x in (retain, forget))
  tolerance = min(64 * epsilon, epsilon**0.5)

  retain_unit, retain_norm = _normalize(retain.astype(dtype))
  forget_unit, forget_norm = _normalize(forget.astype(dtype))
  cosine = jnp.sum(retain_unit * forget_unit)
  once = retain_unit - cosine * forget_unit
  orthogonal = once - jnp.sum(once * forget_unit) * forget_unit
  sine = _safe_sqrt(jnp.sum(orthogonal * orthogonal))
  geometry = Geometry(retain_norm, forget_norm, cosine, sine, colinear=sine <= tolerance)
  return geometry, Frame(retain_unit, forget_unit, orthogonal)


def measure_blocks(retain: list, forget: list) -> tuple[Geometry, list[Group]]:
  """Measures T blocks, each by itself; see `measure`.

  Blocks of one shape and dtype are stacked and measured together: a model of many layers would
  otherwise make a program of hundreds of equal parts, which takes longer to compile than the rest.

  Args:
    retain: T arrays.
    forget: T arrays of the same shapes.

  Returns:
    The `Geometry` of [T] vectors in the order of the blocks, and the groups with their frames.
  """
  places: dict[tuple, list[int]] = {}
  for place, pair in enumerate(zip(retain, forget, strict=True)):
    places.setdefault(tuple((jnp.shape(x), jnp.result_type(x)) for x in pair), []).append(place)

  def measured(group):
    stacks = [jnp.stack([blocks[place] for place in group]) for blocks in (retain, forget)]
    return jax.vmap(measure)(*stacks)

  geometries, frames = zip(*map(measured, places.values()), strict=True)
  order_T = np.argsort(np.concatenate(list(places.values())))
  geometry = jax.tree.map(lambda *parts: jnp.concatenate(parts)[order_T], *geometries)
  return geometry, list(map(Group, map(tuple, places.values()), frames))


def align(retain, forget) -> Alignment:
  """`Alignment` of two gradient trees of the same structure, tensor by tensor."""
  geometry, _ = measure_blocks(jax.tree.leaves(retain), jax.tree.leaves(forget))
  return Alignment(geometry.angle, geometry.retain_norm, geometry.forget_norm, geometry.dot)


def zero_alignment(params) -> Alignment:
  """The `Alignment` of a state that has seen no gradients, shaped like that of `params`."""
  zeros_T = jnp.zeros(len(jax.tree.leaves(params)), compute_dtype(params))
  return Alignment(zeros_T, zeros_T, zeros_T, zeros_T)


def _normalize(x):
  """The unit vector and the norm of an array read as a vector; not finite in, not finite out."""
  peak = lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
  # Below the smallest normal number a quotient may be flushed to 0/0; such a gradient is zero.
  scale = jnp.where(peak < jnp.finfo(x.dtype).tiny, 1, peak)
  scaled = x / scale
  length = _safe_sqrt(jnp.sum(scaled * scaled))
  return scaled / jnp.where(length == 0, 1, length), scale * length


def _safe_sqrt(square):
  """Square root whose derivative at zero is zero; NaN stays NaN."""
  is_zero = square == 0
  return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def tensor_names(params: Any) -> list[str]:
  """Names such as ``stage1.block0.conv.kernel`` of a pytree's leaves, in tree-leaf order."""
  leaves, _ = jax.tree.flatten_with_path(params)
  return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
