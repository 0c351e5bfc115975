"""Rotary embedding in closed form."""

import jax.numpy as jnp
import numpy as np

from hamu_jax.models import rotary


def test_positions_count_from_zero_in_each_segment():
  segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [0, 0, 5, 5, 5, 1, 5]])
  np.testing.assert_array_equal(
    rotary.segment_positions(segments), [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 0, 0]]
  )


def test_angles_and_norms_are_exact_in_sixteen_bits(tiny_llama):
  angles = rotary.rotary_angles(jnp.asarray([[4001]]), tiny_llama.config)
  # theta = 10000 and H = 16: the second frequency is 10000^(-1/8).
  np.testing.assert_allclose(angles[0, 0, :2], [4001, 4001 * 10000 ** (-1 / 8)], rtol=1e-6)
  head = jnp.asarray([[[[3.0, 4.0]]]], jnp.bfloat16)
  turned = rotary.rotate(head, jnp.asarray([[[1000.25]]], jnp.float32))
  # 1000.25 is no bfloat16: its neighbours, 1000 and 1004, are far from it on the circle.
  cos, sin = np.cos(1000.25), np.sin(1000.25)
  expected = [3 * cos - 4 * sin, 4 * cos + 3 * sin]
  np.testing.assert_allclose(np.asarray(turned, np.float32).ravel(), expected, rtol=2**-8)
