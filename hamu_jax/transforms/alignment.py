"""Geometry of two gradients: their norms, their angle and the plane they span.

All code that compares a retain and a forget gradient measures them here, so that the angle in a log, the
branch of HAMU and an alignment plot agree.
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
  colinear: jax.Array  # bool, the sine is at most rounding error; true when g_r is zero

  @property
  def dot(self) -> jax.Array:
    """g_r . g_f."""
    return self.cosine * self.retain_norm * self.forget_norm

  @property
  def angle(self) -> jax.Array:
    """Angle between the gradients in degrees, 90 when either is zero.

    It is computed from sine and cosine, because the arc cosine loses half the digits near 0 and 180 degrees.
    """
    sine = jnp.where(self.retain_norm == 0, 1, self.sine)
    return jnp.degrees(jnp.arctan2(sine, self.cosine))


class Frame(NamedTuple):
  """The directions of one block's gradients, or coordinates along them.

  Directions have the shape of the block. The direction of a zero gradient is zero.
  """

  retain: jax.Array  # g_r / |g_r|
  forget: jax.Array  # g_f / |g_f|
  orthogonal: jax.Array  # g_r / |g_r| minus its component along g_f


class Group(NamedTuple):
  """The n of T blocks that have one shape and dtype."""

  places: tuple[int, ...]  # indices of the n blocks among the T
  frame: Frame  # each direction is [n, ...]


class Alignment(NamedTuple):
  """Diagnostics of a pair of gradients, one entry per tensor in tree-leaf order.

  The gradients are measured as passed to the transform, with the sign and coefficient of their
  objectives: 0 degrees means that descending one objective descends the other.
  """

  angle: jax.Array  # [T] degrees
  retain_norm: jax.Array  # [T]
  forget_norm: jax.Array  # [T]
  dot: jax.Array  # [T] g_r . g_f


def compute_dtype(tree) -> jnp.dtype:
  """The dtype in which norms and dot products of a tree are computed: its own, or at least float32."""
  return jnp.promote_types(jnp.result_type(jnp.float16, *jax.tree.leaves(tree)), jnp.float32)


def measure(retain, forget) -> tuple[Geometry, Frame]:
  """Measures two gradients of one block.

  Each vector is first scaled by its largest entry, so that squares neither underflow nor overflow.
  The orthogonal part is orthogonalised twice: the first pass leaves a residue along the forget
  gradient that grows with the size of the tensor; the second leaves only the rounding of single
  entries. Gradients count as colinear if the sine is at most 64 machine epsilons (for 16-bit inputs, the
  square root of one). Below that, the direction of the orthogonal part is noise, and a step along it could
  gain at most that fraction of `radius * |g_r|`.

  Args:
    retain: g_r, array of any shape.
    forget: g_f, array of the same shape.

  Returns:
    The `Geometry`, whose fields are scalars, and the `Frame`, in the inputs' dtype (float32 for 16-bit
    inputs).
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

  Blocks of one shape and dtype are stacked and measured in one batch. Otherwise the program of a model with
  many layers would have hundreds of equal parts, which take longer to compile than everything else.

  Args:
    retain: T arrays.
    forget: T arrays of the same shapes.

  Returns:
    The `Geometry`, whose fields are [T] in the order of the blocks, and the groups with their frames.
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
  """The `Alignment` before the first gradients: zeros, with one entry for each tensor of `params`."""
  zeros_T = jnp.zeros(len(jax.tree.leaves(params)), compute_dtype(params))
  return Alignment(zeros_T, zeros_T, zeros_T, zeros_T)


def _normalize(x):
  """The unit vector and the norm of an array as a vector; inputs that are not finite stay so."""
  peak = lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
  # Below the smallest normal number a quotient may be flushed to 0/0, so such a gradient counts as zero.
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
