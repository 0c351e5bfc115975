"""A convolution with its batch norm against the two layers one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.models.batch_norm import BatchNorm
from hamu_jax.models.conv_norm import ConvNorm
from hamu_jax.models.convolution import convolve


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
def test_equals_its_two_layers(x64, use_bias, train):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((4, 6, 6, 3)))
  layer = ConvNorm(5, "cpu", stride=2, use_bias=use_bias)
  variables = jax.tree.map(
    lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape)),
    jax.eval_shape(lambda: layer.init(jax.random.key(0), x, train=False)),
  )
  assert ("bias" in variables["params"]) == use_bias

  def separate(params, x):
    y = convolve(x, params["kernel"], stride=2, platform="tpu")
    if use_bias:
      y += params["bias"].reshape(1, 1, 1, -1)
    norm = {"params": params["norm"], "batch_stats": variables["batch_stats"]["norm"]}
    y, updated = BatchNorm(5).apply(norm, y, train=train, mutable=["batch_stats"])
    return y, updated["batch_stats"]

  def together(params, x):
    y, updated = layer.apply({**variables, "params": params}, x, train=train, mutable=["batch_stats"])
    return y, updated["batch_stats"]["norm"]

  def run(function):
    def loss(params, x):
      y, stats = function(params, x)
      return jnp.sum(jnp.sin(y)), stats

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), run(together), run(separate)
  )
