"""Batch normalisation as PyTorch's, with masked and cross-device statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class BatchNorm(nn.Module):
  """Normalises over every axis but the last.

  `y = (x - m) / sqrt(v + epsilon) * scale + bias`. In training mode m and v are the batch's mean and *biased* variance,
  and the running averages become `(1 - momentum) * running + momentum * (m, v n / (n - 1))`, the *unbiased* variance;
  otherwise m and v are the running averages. n counts the values of unmasked examples only.

  Source: torch.nn.BatchNorm2d.

  Attributes:
    momentum: weight of the new statistics (PyTorch's convention).
    epsilon: added to the variance.
  """

  momentum: float = 0.1
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x, *, train, mask=None, axis_name=None):
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
    var = self.variable("batch_stats", "var", jnp.ones, (channels,))
    m, v = mean.value, var.value
    if train:
      m, v, n = masked_moments(x, mask, axis_name)
      if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
        weight = jnp.where(n > 0, self.momentum, 0.0).astype(m.dtype)
        mean.value += weight * (lax.stop_gradient(m) - mean.value)
        unbiased = lax.stop_gradient(v) * (n / jnp.maximum(n - 1, 1))
        var.value += weight * (unbiased - var.value)
    shape = (1,) * (x.ndim - 1) + (channels,)
    factor = scale * lax.rsqrt(v + jnp.asarray(self.epsilon, v.dtype))
    return (x - m.reshape(shape)) * factor.reshape(shape) + bias.reshape(shape)


def masked_moments(x, mask, axis_name):
  """Mean, biased variance and count of a channel's values over unmasked examples, two-pass."""
  axes = tuple(range(x.ndim - 1))
  per_example = x.size // (x.shape[0] * x.shape[-1])
  if mask is None:
    weight = jnp.ones((x.shape[0],), x.dtype)
  else:
    weight = mask.astype(x.dtype)
  total = (lambda v: v) if axis_name is None else (lambda v: lax.psum(v, axis_name))
  weight_b = weight.reshape((-1,) + (1,) * (x.ndim - 1))
  n = total(jnp.sum(weight) * per_example)
  safe_n = jnp.maximum(n, 1)
  mean = total(jnp.sum(x * weight_b, axes)) / safe_n
  centred = x - mean.reshape((1,) * (x.ndim - 1) + (-1,))
  var = total(jnp.sum(jnp.square(centred) * weight_b, axes)) / safe_n
  return mean, var, n
