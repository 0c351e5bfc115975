"""Angles against constructed ones and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.analysis.alignment import angles, tensor_names


def _rotated(degrees, norm):
  """A pair of vectors in 3-space that enclose the given angle."""
  radians = np.deg2rad(degrees)
  return np.array([2.0, 0, 0]), norm * np.array([np.cos(radians), 0, np.sin(radians)])


@pytest.mark.parametrize("degrees", (0.0, 1e-6, 30.0, 90.0, 135.0, 179.999999, 180.0))
def test_constructed_angles(degrees, x64):
  retain, forget = _rotated(degrees, norm=1e-5)
  result = angles({"w": jnp.asarray(retain)}, {"w": jnp.asarray(forget)})
  assert float(result.tensor[0]) == pytest.approx(degrees, abs=1e-9)
  assert float(result.model) == pytest.approx(degrees, abs=1e-9)


def test_tensors_and_model_against_numpy(x64):
  rng = np.random.default_rng(0)
  retain = {"a": rng.normal(size=(3, 4)), "b": {"c": rng.normal(size=5)}}
  forget = {"a": rng.normal(size=(3, 4)), "b": {"c": 10 * rng.normal(size=5)}}

  def angle(u, v):
    return np.rad2deg(np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v)))

  pairs = [(retain["a"].ravel(), forget["a"].ravel()), (retain["b"]["c"], forget["b"]["c"])]
  result = jax.jit(angles)(*jax.tree.map(jnp.asarray, (retain, forget)))
  np.testing.assert_allclose(result.tensor, [angle(*pair) for pair in pairs], rtol=1e-12)
  whole = [np.concatenate(side) for side in zip(*pairs)]
  np.testing.assert_allclose(result.model, angle(*whole), rtol=1e-12)


def test_zero_gradients_are_orthogonal():
  zero, one = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
  for pair in ((zero, one), (one, zero), (zero, zero)):
    result = angles(*pair)
    assert (float(result.tensor[0]), float(result.model)) == (90.0, 90.0)


@pytest.mark.parametrize("dtype", ("float32", "float64"))
def test_dtype(dtype, x64):
  gradients = {"w": jnp.ones(3, dtype)}
  assert {leaf.dtype.name for leaf in angles(gradients, gradients)} == {dtype}


def test_names_follow_the_leaves():
  params = {"head": {"kernel": 1, "bias": 2}, "blocks": [{"scale": 3}, {"scale": 4}]}
  assert tensor_names(params) == ["blocks.0.scale", "blocks.1.scale", "head.bias", "head.kernel"]
  assert jax.tree.leaves(params) == [3, 4, 2, 1]
