"""Batch normalisation with PyTorch's semantics, example masks and cross-device statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Axes = str | tuple[str, ...] | None


class BatchNorm(nn.Module):
  """Normalises each channel, the last axis, over all others.

  `y = (x - m) / sqrt(v + epsilon) * scale + bias`

  In training, m and v are the mean and the *biased* variance of the batch, and the running averages
  become `(1 - momentum) running + momentum (m, v n / (n - 1))`, with the *unbiased* variance. Here n is the
  number of values of a channel in unmasked examples on all devices. In evaluation, m and v are the running
  averages.

  Source: torch.nn.BatchNorm2d.

  Attributes:
    features: C, number of channels.
    momentum: weight of the batch in the running averages; one minus Flax's momentum.
    epsilon: constant added to the variance.
  """

  features: int
  momentum: float = 0.1
  epsilon: float = 1e-5

  def setup(self):
    shape = (self.features,)
    self.scale = self.param("scale", nn.initializers.ones, shape)
    self.bias = self.param("bias", nn.initializers.zeros, shape)
    self.mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
    self.var = self.variable("batch_stats", "var", jnp.ones, shape)

  def frozen(self) -> tuple[jax.Array, jax.Array]:
    """(factor, shift), both [C]: evaluation computes `x factor + shift`, which a layer can absorb."""
    factor = self.scale * lax.rsqrt(self.var.value + self.epsilon)
    return factor, self.bias - self.mean.value * factor

  def __call__(
    self,
    x: jax.Array,
    *,
    train: bool,
    mask: jax.Array | None = None,
    axis_name: Axes = None,
  ) -> jax.Array:
    """Normalises `x`.

    Args:
      x: [B, ..., C] activations.
      train: whether batch statistics are used and, if `batch_stats` is mutable, recorded.
      mask: [B], zero for padding, which does not enter the statistics; None counts all examples.
      axis_name: mapped axis or axes of the devices over which training statistics are computed.

    Returns:
      Activations of the same shape and dtype. A batch without valid examples does not change the running
      averages.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, var = self.mean.value, self.var.value
    if train:
      mean, var, count = masked_moments(wide, mask, axis_name)
      if self.is_mutable_collection("batch_stats") and not self.is_initializing():
        self._record(lax.stop_gradient(mean), lax.stop_gradient(var), count)
    broadcast = (1,) * (x.ndim - 1) + (-1,)
    factor = self.scale * lax.rsqrt(var + self.epsilon)
    y = (wide - mean.reshape(broadcast)) * factor.reshape(broadcast)
    return (y + self.bias.reshape(broadcast)).astype(x.dtype)

  def _record(self, mean, var, count):
    weight = jnp.where(count > 0, self.momentum, 0).astype(mean.dtype)
    unbiased = var * count / jnp.maximum(count - 1, 1)
    self.mean.value += weight * (mean - self.mean.value)
    self.var.value += weight * (unbiased - self.var.value)


def masked_moments(
  x: jax.Array, mask: jax.Array | None, axis_name: Axes
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Mean [C] and biased variance [C] of each channel over valid examples, and its number of values n.

  `m = sum x / n`, `v = sum (x - m)^2 / n`. They take two passes, because the one-pass form suffers from
  cancellation if the mean is large. Without any value both are 0; with a single value the variance is 0.

  Args:
    x: [B, ..., C] activations.
    mask: [B], zero for an example that does not count, or None.
    axis_name: mapped axis or axes to sum over as well, or None.
  """
  axes = tuple(range(x.ndim - 1))

  def total(values):
    return values if axis_name is None else lax.psum(values, axis_name)

  def valid_sum(values):
    if mask is not None:
      values = jnp.where(mask.reshape((-1,) + (1,) * (x.ndim - 1)) != 0, values, 0)
    return total(jnp.sum(values, axes))

  examples = x.shape[0] if mask is None else jnp.sum(mask != 0)
  count = total(jnp.asarray(examples * (x[0].size // x.shape[-1]), x.dtype))
  divisor = jnp.maximum(count, 1)
  mean = valid_sum(x) / divisor
  # The derivative of the variance with respect to the mean is zero, so no gradient flows through the mean.
  centred = x - lax.stop_gradient(mean).reshape((1,) * (x.ndim - 1) + (-1,))
  return mean, valid_sum(jnp.square(centred)) / divisor, count
