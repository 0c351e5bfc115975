"""One 2-D convolution with two forms: `lax.conv` and, on CPUs, patches times a matrix."""

import jax
import jax.numpy as jnp
from jax import lax


def convolve(x_BxHxWxC: jax.Array, kernel: jax.Array, *, stride: int = 1, platform: str) -> jax.Array:
  """PyTorch's `Conv2d` without bias: odd kernel k, zero padding k // 2."""
  k = kernel.shape[0]
  if platform != "cpu":
    return lax.conv_general_dilated(
        x_BxHxWxC, kernel, (stride, stride), [(k // 2, k // 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"))
  b, h, w, c = x_BxHxWxC.shape
  pad = k // 2
  x = jnp.pad(x_BxHxWxC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  ho, wo = -(-h // stride), -(-w // stride)
  slices = [
      lax.slice(x, (0, i, j, 0), (b, i + (ho - 1) * stride + 1, j + (wo - 1) * stride + 1, c),
                (1, stride, stride, 1))
      for i in range(k) for j in range(k)]
  patches = jnp.concatenate(slices, axis=-1)
  return patches @ kernel.reshape(k * k * c, -1)
