"""Norms and angles of pairs of gradients, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.transforms import alignment


@pytest.mark.parametrize("degrees", [0.0, 1e-2, 30.0, 89.999, 90.0, 150.0, 179.99, 180.0])
@pytest.mark.parametrize("size", [2, 100_000])
def test_float32_angles_near_the_poles(degrees, size):
  """An arc cosine in float32 knows angles below 0.02 degrees only as zero."""
  rng = np.random.default_rng(size)
  basis, _ = np.linalg.qr(rng.normal(size=[size, 2]))
  retain = np.asarray(7 * basis[:, 0], np.float32)
  turned = np.cos(np.radians(degrees)) * basis[:, 0] + np.sin(np.radians(degrees)) * basis[:, 1]
  forget = np.asarray(0.02 * turned, np.float32)
  geometry, _ = jax.jit(alignment.measure)(retain, forget)
  np.testing.assert_allclose(geometry.angle, degrees, atol=3e-5)
  assert bool(geometry.colinear) == (degrees in (0.0, 180.0))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e18])
def test_float32_norms_of_any_size(scale):
  """Their squares underflow or overflow; the norms do not."""
  rng = np.random.default_rng(0)
  retain, forget = (np.asarray(scale * rng.normal(size=10_000), np.float32) for _ in range(2))
  geometry, frame = alignment.measure(jnp.asarray(retain), jnp.asarray(forget))
  r, f = retain.astype(np.float64), forget.astype(np.float64)
  np.testing.assert_allclose(geometry.retain_norm, np.linalg.norm(r), rtol=1e-6)
  np.testing.assert_allclose(geometry.forget_norm, np.linalg.norm(f), rtol=1e-6)
  cosine = r @ f / np.linalg.norm(r) / np.linalg.norm(f)
  np.testing.assert_allclose(geometry.cosine, cosine, atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(frame.retain), 1, rtol=1e-6)


@pytest.mark.parametrize("zero", ["retain", "forget", "both"])
def test_zero_gradients_are_at_right_angles(zero):
  retain = jnp.zeros(3) if zero != "forget" else jnp.ones(3)
  forget = jnp.zeros(3) if zero != "retain" else jnp.ones(3)
  aligned = alignment.align([retain], [forget])
  np.testing.assert_array_equal(aligned.angle, [90])
  np.testing.assert_array_equal(aligned.dot, [0])


def test_a_nan_shows():
  aligned = alignment.align([jnp.array([1.0, np.nan])], [jnp.ones(2)])
  assert np.isnan(aligned.retain_norm[0]) and np.isnan(aligned.angle[0])
  assert np.isfinite(aligned.forget_norm[0])


def test_every_block_has_its_place_and_frame():
  """Whatever order shapes and dtypes come in: NumPy's norms and dot products, tensor by tensor."""
  rng = np.random.default_rng(0)
  kinds = [
    ((2, 3), "f4"),
    ((4,), "f4"),
    ((2, 3), "f4"),
    ((2, 3), "f2"),
    ((4,), "f4"),
    ((3, 2), "f4"),
  ]
  retain, forget = (
    [rng.normal(size=shape, scale=10.0**place).astype(dtype) for place, (shape, dtype) in enumerate(kinds)]
    for _ in range(2)
  )
  aligned = alignment.align(retain, forget)
  wide = [[x.astype(np.float64).ravel() for x in tree] for tree in (retain, forget)]
  dots = [r @ f for r, f in zip(*wide, strict=True)]
  np.testing.assert_allclose(aligned.retain_norm, [np.linalg.norm(r) for r in wide[0]], rtol=1e-6)
  np.testing.assert_allclose(aligned.forget_norm, [np.linalg.norm(f) for f in wide[1]], rtol=1e-6)
  np.testing.assert_allclose(aligned.dot, dots, rtol=1e-4)
  _, groups = alignment.measure_blocks(retain, forget)
  assert [group.places for group in groups] == [(0, 2), (1, 4), (3,), (5,)]
  for places, frame in groups:
    for place, direction in zip(places, frame.forget, strict=True):
      expected = wide[1][place].reshape(direction.shape) / np.linalg.norm(wide[1][place])
      np.testing.assert_allclose(direction, expected, rtol=1e-5)
