"""The CPU form of the convolution against JAX's gradients and against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from hamu_jax.models.convolution import convolve, microbatch_size


def problem(shape, size, features, dtype=np.float64, seed=0):
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.standard_normal(shape), dtype)
  return x, jnp.asarray(rng.standard_normal((size, size, shape[-1], features)), dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def outputs_and_gradients(x, kernel, stride, platform):
  y, pullback = jax.vjp(functools.partial(convolve, stride=stride, platform=platform), x, kernel)
  dy = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
  return y, *pullback(dy)


def by_definition(x, kernel, stride):
  x, kernel = np.asarray(x), np.asarray(kernel)
  size = kernel.shape[0]
  b, h, w, _ = x.shape
  padded = np.pad(x, ((0, 0), *[(size // 2, size // 2)] * 2, (0, 0)))
  y = np.zeros((b, -(-h // stride), -(-w // stride), kernel.shape[-1]))
  for u in range(y.shape[1]):
    for v in range(y.shape[2]):
      window = padded[:, u * stride : u * stride + size, v * stride : v * stride + size]
      y[:, u, v] = np.einsum("bijc,ijco->bo", window, kernel)
  return y


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [3, 8])
def test_definition(x64, platform, stride, channels):
  x, kernel = problem((2, 5, 6, channels), 3, 4)
  y = convolve(x, kernel, stride=stride, platform=platform)
  np.testing.assert_allclose(y, by_definition(x, kernel, stride), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size, stride", [(1, 1), (1, 2), (3, 1), (3, 2), (5, 3)])
@pytest.mark.parametrize("height, width", [(8, 8), (7, 10), (1, 1)])
@pytest.mark.parametrize("channels, features", [(1, 8), (9, 3)])
def test_both_forms_agree(x64, size, stride, height, width, channels, features):
  x, kernel = problem((3, height, width, channels), size, features)
  own = outputs_and_gradients(x, kernel, stride, "cpu")
  for value, expected in zip(own, outputs_and_gradients(x, kernel, stride, "tpu"), strict=True):
    assert value.shape == expected.shape
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-11)


def test_float32():
  x, kernel = problem((4, 16, 16, 8), 3, 8, np.float32)
  own = outputs_and_gradients(x, kernel, 1, "cpu")
  for value, expected in zip(own, outputs_and_gradients(x, kernel, 1, "tpu"), strict=True):
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("shared", [True, False])
def test_vmap(x64, shared):
  x, kernel = problem((2, 3, 6, 6, 8), 3, 4)
  kernels = jnp.stack([kernel, kernel + 1])
  run = lambda x, kernel: outputs_and_gradients(x, kernel, 2, "cpu")
  mapped = jax.jit(jax.vmap(run, (0, None if shared else 0)))(x, kernel if shared else kernels)
  for role in range(2):
    expected = outputs_and_gradients(x[role], kernels[0 if shared else role], 2, "tpu")
    for value, wanted in zip(mapped, expected, strict=True):
      np.testing.assert_allclose(value[role], wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("channels", [3, 8])
def test_inside_a_while_loop(x64, channels):
  x, kernel = problem((2, 6, 6, channels), 3, 4)

  def loss(kernel, platform):
    return jnp.sum(jnp.sin(convolve(x, kernel, platform=platform)))

  def descend(platform):
    gradient = functools.partial(jax.grad(loss), platform=platform)
    return jax.jit(lambda k: lax.fori_loop(0, 3, lambda _, k: k - 0.1 * gradient(k), k))(kernel)

  np.testing.assert_allclose(descend("cpu"), descend("tpu"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("channels", [3, 8])
def test_shard_map(x64, check_vma, channels):
  x, kernel = problem((8, 6, 6, channels), 3, 4)
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))

  def loss(x, kernel):
    return jnp.sum(jnp.sin(convolve(x, kernel, platform="cpu")))

  def sharded(x, kernel):
    if check_vma:
      return jax.grad(lambda *inputs: lax.psum(loss(*inputs), "data"), (0, 1))(x, kernel)
    dx, dkernel = jax.grad(loss, (0, 1))(x, kernel)
    return dx, lax.psum(dkernel, "data")

  specs = P("data"), P()
  gradients = jax.jit(
    jax.shard_map(sharded, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=check_vma)
  )(x, kernel)
  for value, expected in zip(gradients, jax.grad(loss, (0, 1))(x, kernel), strict=True):
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-11)


def test_backward_keeps_no_patches():
  x, kernel = problem((2, 8, 8, 8), 3, 4, np.float32)
  _, pullback = jax.vjp(functools.partial(convolve, platform="cpu"), x, kernel)
  assert sum(leaf.size for leaf in jax.tree.leaves(pullback)) <= x.size + kernel.size


def test_microbatch_size():
  assert microbatch_size(32, 32) == 16
  assert microbatch_size(8, 8) == 256
  assert microbatch_size(1000, 1000) == 1
