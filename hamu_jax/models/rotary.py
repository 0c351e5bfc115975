"""Rotary position embedding: pairs of a head's coordinates are rotated by angles that grow with position.

Source: Su et al., RoFormer (arXiv 2104.09864); Llama 3's scaling as Hugging Face computes it.

Shapes: B rows, T tokens of a row, N heads, H head dimension, R = H / 2 pairs of a head.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from hamu_jax.models.llama_config import LlamaConfig


def rotary_angles(position_BxT: jax.Array, config: LlamaConfig) -> jax.Array:
  """Computes the rotation angles of the pairs of a head: `position f_i` with `f_i = theta^(-2i / H)`.

  Llama 3 scales the frequencies by their number of turns `n_i = C f_i / 2 pi` in the original context of
  C tokens:

    `f_i <- (1 - s) f_i / factor + s f_i`,  `s = clip((n_i - low) / (high - low), 0, 1)`.

  Args:
    position_BxT: integer position of each token.
    config: configuration of the model; its `rope_theta`, `rope_scaling` and `head_dim` are read.

  Returns:
    [B, T, H / 2] float32, in radians.
  """
  pairs = jnp.arange(config.head_dim // 2, dtype=jnp.float32)
  frequency_R = jnp.float32(config.rope_theta) ** (-2 * pairs / config.head_dim)
  if scaling := config.rope_scaling:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns_R = scaling.original_max_position_embeddings / (2 * math.pi) * frequency_R
    kept_R = jnp.clip((turns_R - low) / (high - low), 0, 1)
    frequency_R *= (1 - kept_R) / scaling.factor + kept_R
  return position_BxT[:, :, None].astype(jnp.float32) * frequency_R[None, None, :]


def rotate(x_BxTxNxH: jax.Array, angles_BxTxR: jax.Array) -> jax.Array:
  """Rotates the pairs (i, i + H / 2) of each head by their angles, in float32.

  Args:
    x_BxTxNxH: queries or keys.
    angles_BxTxR: angles in radians, see `rotary_angles`.

  Returns:
    Queries or keys of the same shape and dtype.
  """
  cos, sin = jnp.cos(angles_BxTxR)[:, :, None], jnp.sin(angles_BxTxR)[:, :, None]
  first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x_BxTxNxH.dtype)


def segment_positions(segment_BxT: jax.Array) -> jax.Array:
  """Position of each token in its segment, a run of equal numbers; int32 [B, T], from 0."""
  index_BxT = jnp.broadcast_to(jnp.arange(segment_BxT.shape[1], dtype=jnp.int32), segment_BxT.shape)
  before_BxT = jnp.roll(segment_BxT, 1, axis=1)
  starts_BxT = jnp.where((segment_BxT != before_BxT) & (index_BxT > 0), index_BxT, 0)
  return index_BxT - lax.cummax(starts_BxT, axis=1)
