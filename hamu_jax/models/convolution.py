"""One 2-D convolution whose gradients XLA's CPU backend computes as fast as its outputs.

XLA calls its fast convolution libraries on a CPU only for convolutions in one form: channels last, no
reversed kernel. JAX differentiates into other forms, which run in a naive loop, a hundred times slower inside
`while` and `scan` (JAX issue 12868). Both gradients are convolutions themselves. Here they are written in the
fast form: reversal and transpositions are operations of their own. Patches, which take nine times the memory
of the activations for 3x3 kernels, are gathered only where that form is slow.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Eigen, which XLA calls, is up to ten times slower for fewer channels and for images smaller than the kernel.
_LEAST_CHANNELS = 8
# Positions (examples x height x width) of the microbatch at which a whole network is fastest.
_MICROBATCH_POSITIONS = 16 * 32 * 32


def microbatch_size(height: int, width: int) -> int:
  """Number of examples in a microbatch at which the CPU form is fastest, for frozen batch norm.

  The gradient is then a sum over examples, and all activations of a microbatch stay in the cache.
  The number is 16 for 32x32 images and 256 for 8x8 images.
  """
  return max(1, _MICROBATCH_POSITIONS // (height * width))


def convolve(x_BxHxWxC: jax.Array, kernel_KxKxCxO: jax.Array, *, stride: int = 1, platform: str) -> jax.Array:
  """PyTorch's `Conv2d` without bias: odd kernel size K, zero padding K // 2 on every side.

  `y[b, u, v, o] = sum_{i, j, c} x[b, S u + i - K // 2, S v + j - K // 2, c] kernel[i, j, c, o]`

  Args:
    x_BxHxWxC: images or activations.
    kernel_KxKxCxO: kernel of the same dtype.
    stride: S, stride along both axes.
    platform: "cpu" has gradients in the fast form, any other value those of JAX. Both give the same result.

  Returns:
    [B, ceil(H / S), ceil(W / S), O] activations of the same dtype.
  """
  if platform != "cpu":
    return _outputs(stride, x_BxHxWxC, kernel_KxKxCxO)
  if x_BxHxWxC.shape[-1] < _LEAST_CHANNELS or min(x_BxHxWxC.shape[1:3]) < kernel_KxKxCxO.shape[0]:
    return _by_patches(x_BxHxWxC, kernel_KxKxCxO, stride)
  # Under shard_map this zero varies over devices like x, and adding it makes a replicated kernel vary, too.
  # It is added outside the custom gradient, where JAX sums the kernel's gradient over devices.
  kernel_KxKxCxO += jnp.zeros_like(x_BxHxWxC, shape=())
  return _convolve(x_BxHxWxC, kernel_KxKxCxO, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x_BxHxWxC, kernel, stride):
  return _one_by_one(_outputs, stride)(x_BxHxWxC, kernel)


def _convolve_fwd(x_BxHxWxC, kernel, stride):
  return _convolve(x_BxHxWxC, kernel, stride), (x_BxHxWxC, kernel)


def _convolve_bwd(stride, residuals, dy_BxUxVxO):
  return _one_by_one(_gradients, stride)(*residuals, dy_BxUxVxO)


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


@functools.cache
def _one_by_one(function, stride):
  """`function` with its stride. Under `vmap` it is a loop: batched kernels would leave the fast form."""
  return jax.custom_batching.sequential_vmap(jax.jit(functools.partial(function, stride)))


def _outputs(stride, x_BxHxWxC, kernel):
  pad = kernel.shape[0] // 2
  return _fast(x_BxHxWxC, kernel, ((pad, pad),) * 2, strides=stride)


def _gradients(stride, x_BxHxWxC, kernel, dy_BxUxVxO):
  """Gradients with respect to the input and the kernel.

  dx[h] = sum_i dy[(h + K // 2 - i) / S] kernel[i]^T, where the quotient is whole: the output gradients, S - 1
  zeros between them, meet the reversed kernel. dkernel[i] = sum_u x[S u + i - K // 2]^T dy[u]: the examples
  take the place of the channels, and the output gradients, S - 1 zeros between them, that of the kernel.
  """
  size, pad = kernel.shape[0], kernel.shape[0] // 2
  # What is left of each side of the inputs after the last position of the kernel.
  ends = [
    (length, (outputs - 1) * stride + 1)
    for length, outputs in zip(x_BxHxWxC.shape[1:3], dy_BxUxVxO.shape[1:3], strict=True)
  ]
  dx = _fast(
    dy_BxUxVxO,
    kernel[::-1, ::-1].swapaxes(2, 3),
    [(size - 1 - pad, length + pad - reach) for length, reach in ends],
    between_inputs=stride,
  )
  dkernel = _fast(
    x_BxHxWxC.transpose(3, 1, 2, 0),
    dy_BxUxVxO.transpose(1, 2, 0, 3),
    [(pad, reach + size - 1 - length - pad) for length, reach in ends],
    between_taps=stride,
  )
  return dx, dkernel.transpose(1, 2, 0, 3)


def _fast(x, kernel, padding, *, strides=1, between_inputs=1, between_taps=1):
  """The one form of convolution for which XLA calls its libraries."""

  return lax.conv_general_dilated(
    x,
    kernel,
    (strides, strides),
    padding,
    lhs_dilation=(between_inputs, between_inputs),
    rhs_dilation=(between_taps, between_taps),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _by_patches(x, kernel, stride):
  """The inputs of each output position in a row, its patch, times the kernel."""
  size, _, _, features = kernel.shape
  pad = size // 2
  padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  # From this row and column to the last ones at which the kernel starts.
  rows, columns = (length + 2 * pad - size + 1 for length in x.shape[1:3])
  taps = [
    padded[:, i : i + rows : stride, j : j + columns : stride] for i in range(size) for j in range(size)
  ]
  patches = jnp.stack(taps, 3)
  return patches.reshape(*patches.shape[:3], -1) @ kernel.reshape(-1, features)
