"""Batch normalisation against PyTorch's definition, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from hamu_jax.models.batch_norm import BatchNorm

EPSILON = 1e-5
SHAPE = (8, 3, 2, 5)


@pytest.fixture
def x(x64):
  del x64
  return np.random.default_rng(0).standard_normal(SHAPE) * 2 + 3


@pytest.fixture
def variables(x64):
  del x64
  rng = np.random.default_rng(1)
  draw = lambda: jnp.asarray(rng.uniform(0.5, 2, SHAPE[-1]))
  return {"params": {"scale": draw(), "bias": draw()}, "batch_stats": {"mean": draw(), "var": draw()}}


def run(variables, x, train=True, **options):
  norm = BatchNorm(x.shape[-1])
  return norm.apply(variables, x, train=train, mutable=["batch_stats"], **options)


def in_numpy(variables, x, valid):
  """Outputs and running averages of PyTorch's BatchNorm2d on the valid rows."""
  rows = x[valid].reshape(-1, x.shape[-1])
  mean, var = rows.mean(0), rows.var(0)
  y = (x - mean) / np.sqrt(var + EPSILON)
  y = y * np.asarray(variables["params"]["scale"]) + np.asarray(variables["params"]["bias"])
  running = {name: np.asarray(value) for name, value in variables["batch_stats"].items()}
  return y, {
    "mean": 0.9 * running["mean"] + 0.1 * mean,
    "var": 0.9 * running["var"] + 0.1 * rows.var(0, ddof=1),
  }


@pytest.mark.parametrize("mask", [None, [1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1, 0]])
@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_training(x, variables, mask, dtype):
  valid = np.ones(len(x), bool) if mask is None else np.array(mask, bool)
  # What stands in padding rows must not matter, be it not even a number.
  garbage = np.where(valid.reshape(-1, 1, 1, 1), x, np.nan)
  y, updated = run(variables, garbage, mask=None if mask is None else jnp.asarray(mask, dtype))
  expected, running = in_numpy(variables, x, valid)
  np.testing.assert_allclose(np.asarray(y)[valid], expected[valid], rtol=1e-12)
  for name, value in running.items():
    np.testing.assert_allclose(updated["batch_stats"][name], value, rtol=1e-12)


def test_frozen(x, variables):
  y, updated = run(variables, x, train=False)
  params, stats = variables["params"], variables["batch_stats"]
  expected = (x - np.asarray(stats["mean"])) / np.sqrt(np.asarray(stats["var"]) + EPSILON)
  expected = expected * np.asarray(params["scale"]) + np.asarray(params["bias"])
  np.testing.assert_allclose(y, expected, rtol=1e-12)
  jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], stats)
  factor, shift = BatchNorm(SHAPE[-1]).apply(variables, method="frozen")
  np.testing.assert_allclose(x * np.asarray(factor) + np.asarray(shift), expected, rtol=1e-12)


def test_gradient(x, variables):
  valid = np.array([1, 0, 1, 1, 0, 0, 1, 0], bool)

  def loss(params, x):
    y, _ = run({**variables, "params": params}, x, mask=jnp.asarray(valid))
    return jnp.sum(jnp.sin(y)[valid])

  def plain(params, x):
    rows = x[valid].reshape(-1, x.shape[-1])
    xhat = (rows - jnp.mean(rows, 0)[None]) / jnp.sqrt(jnp.var(rows, 0) + EPSILON)[None]
    return jnp.sum(jnp.sin(xhat * params["scale"][None] + params["bias"][None]))

  got = jax.grad(loss, (0, 1))(variables["params"], jnp.asarray(x))
  expected = jax.grad(plain, (0, 1))(variables["params"], jnp.asarray(x))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, expected)


def test_single_value_and_no_value(variables):
  x = jnp.full((2, 1, 1, SHAPE[-1]), 7.0)
  one = jnp.array([1, 0])
  y, updated = run(variables, x, mask=one)
  # The one value is its own mean, so the output is the bias; a spread of one value counts as zero.
  np.testing.assert_allclose(y[0, 0, 0], variables["params"]["bias"], rtol=1e-12)
  stats = variables["batch_stats"]
  np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.9 * stats["mean"] + 0.7, rtol=1e-12)
  np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 * stats["var"], rtol=1e-12)
  y, updated = run(variables, x, mask=jnp.zeros(2))
  assert np.isfinite(y).all()
  jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], stats)
  for mask in (one, jnp.zeros(2)):
    gradient = jax.grad(lambda p: jnp.sum(run({**variables, "params": p}, x, mask=mask)[0]))(
      variables["params"]
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_large_mean_in_float32():
  x = (np.random.default_rng(0).standard_normal((64, 4, 4, 2)) + 1e4).astype(np.float32)
  norm = BatchNorm(2)
  variables = norm.init(jax.random.key(0), x, train=False)
  y, updated = run(variables, jnp.asarray(x))
  rows = x.astype(np.float64).reshape(-1, 2)
  # The mean itself is only known to a few float32 steps, about 1e-3 each.
  np.testing.assert_allclose(y.reshape(-1, 2), (rows - rows.mean(0)) / rows.std(0), rtol=0, atol=1e-2)
  np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * rows.var(0, ddof=1), rtol=1e-4)


def test_bfloat16_takes_statistics_in_float32():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((32, 4, 4, 2)) + 8, jnp.bfloat16)
  variables = BatchNorm(2).init(jax.random.key(0), x, train=False)
  y, updated = run(variables, x)
  rows = np.asarray(x, np.float64).reshape(-1, 2)
  assert y.dtype == jnp.bfloat16 and updated["batch_stats"]["var"].dtype == jnp.float32
  np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * rows.var(0, ddof=1), rtol=1e-5)


def test_sharded_equals_unsharded(x, variables):
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
  # The second device holds no valid example, the third one of two.
  mask = jnp.array([1, 1, 0, 0, 1, 0, 1, 1])

  def step(params, x, mask, axis_name=None):
    def loss(params, x):
      y, updated = run({**variables, "params": params}, x, mask=mask, axis_name=axis_name)
      return jnp.sum(jnp.sin(y) * mask.reshape(-1, 1, 1, 1)), updated

    def total(*inputs):
      value, updated = loss(*inputs)
      return value if axis_name is None else lax.psum(value, axis_name), updated

    (value, updated), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(params, x)
    return value, updated, gradients

  sharded = jax.jit(
    jax.shard_map(
      lambda *inputs: step(*inputs, axis_name="data"),
      mesh=mesh,
      in_specs=(P(), P("data"), P("data")),
      out_specs=(P(), P(), (P(), P("data"))),
    )
  )
  got = sharded(variables["params"], jnp.asarray(x), mask)
  expected = step(variables["params"], jnp.asarray(x), mask)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), got, expected)
