"""One 2-D convolution in two forms: `lax.conv`, and patches times a matrix for XLA's CPU backend.

On CPUs, XLA calls its fast convolution libraries only in the entry computation. Inside `while` and `scan`,
the gradients of `lax.conv` fall back to a naive loop, which is ten times slower (JAX issue 12868), while
matrix products are fast everywhere. So the CPU form gathers the inputs of each output position into a row,
its patch, and multiplies it by the kernel. Measurements showed that three choices make it fast:

- Patches are nested `stack`s on an axis that is not the last. XLA fuses them into one pass, but
  writes a concatenation of channels twice.
- The backward pass gathers patches of the *output gradient* once and computes both gradients as products
  with them. Only the input and the kernel are kept for it.
- A large batch is processed in chunks whose patches stay in the cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Largest number of patch elements in a chunk: 16 images of 32x32 with 16 channels, 9 MiB in float32.
_CHUNK_ELEMENTS = 16 * 32 * 32 * 9 * 16
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
    platform: "cpu" runs the patch form, any other value runs `lax.conv_general_dilated`. Both give the
      same result.

  Returns:
    [B, ceil(H / S), ceil(W / S), O] activations of the same dtype.
  """
  if platform != "cpu":
    pad = kernel_KxKxCxO.shape[0] // 2
    return lax.conv_general_dilated(
      x_BxHxWxC,
      kernel_KxKxCxO,
      (stride, stride),
      [(pad, pad)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
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
  """`function` with its stride. Under `vmap` it is a loop, because batched patches would leave the cache."""
  return jax.custom_batching.sequential_vmap(jax.jit(functools.partial(function, stride)))


def _outputs(stride, x_BxHxWxC, kernel):
  """Computes all outputs, chunk by chunk."""
  size, _, channels, features = kernel.shape
  reach = range(-(size // 2), size // 2 + 1)

  def chunk(x):
    return _gather(x, reach, stride) @ kernel.reshape(size * size * channels, features)

  b, h, w, c = x_BxHxWxC.shape
  count = _chunk_count(b, -(-h // stride) * -(-w // stride) * size * size * c)
  return _join(lax.map(chunk, _split(x_BxHxWxC, count)), b)


def _gradients(stride, x_BxHxWxC, kernel, dy_BxUxVxO):
  """Gradients with respect to the input and the kernel, chunk by chunk."""
  examples = x_BxHxWxC.shape[0]
  reach = len(_taps(kernel.shape[0], stride)[1])
  count = _chunk_count(examples, reach * reach * dy_BxUxVxO[0].size)

  def accumulate(total, x_dy):
    dx, dkernel = _chunk_gradients(*x_dy, kernel, stride)
    return total + dkernel, dx

  chunks = _split(x_BxHxWxC, count), _split(dy_BxUxVxO, count)
  dkernel, dx = lax.scan(accumulate, jnp.zeros_like(kernel), chunks)
  return _join(dx, examples), dkernel


def _chunk_gradients(x, dy, kernel, stride):
  """Gradients with respect to the input and the kernel, of one chunk.

  Input position S q + a, with phase a in [0, S), meets kernel tap i in output q + d if
  S q + a = S (q + d) + i - K // 2. So the gradient of the S x S cell of inputs at q is one product of the
  output gradients around q with a matrix of kernel taps. The product of these cells with these output
  gradients contains the gradient of the kernel, each tap as one block.
  """
  b, h, w, c = x.shape
  _, u, v, o = dy.shape
  size, s = kernel.shape[0], stride
  taps, reach = _taps(size, s)
  patches = _gather(dy, reach, 1)
  blocks = {(taps[i], taps[j]): kernel[i, j].T for i in range(size) for j in range(size)}
  zero = jnp.zeros_like(kernel[0, 0].T)
  matrix = jnp.concatenate(
    [
      jnp.concatenate([blocks.get(((a, d), (e, f)), zero) for a in range(s) for e in range(s)], 1)
      for d in reach
      for f in reach
    ]
  )
  dx = (patches @ matrix).reshape(b, u, v, s, s, c).swapaxes(2, 3).reshape(b, s * u, s * v, c)
  if size * size * c < patches.shape[-1]:
    # For few input channels, as in a stem, patches of the input are the smaller matrix.
    window = range(-(size // 2), size // 2 + 1)
    return dx[:, :h, :w], _contract(_gather(x, window, s), dy).reshape(kernel.shape)
  cells = jnp.pad(x, ((0, 0), (0, s * u - h), (0, s * v - w), (0, 0)))
  cells = cells.reshape(b, u, s, v, s, c).swapaxes(2, 3).reshape(b, u, v, s * s * c)
  product = _contract(cells, patches).reshape(s, s, c, len(reach), len(reach), o)
  index = [(a, reach.index(d)) for a, d in taps]
  dkernel = jnp.stack([jnp.stack([product[a, e, :, d, f] for e, f in index]) for a, d in index])
  return dx[:, :h, :w], dkernel


def _taps(size, stride):
  """Returns the (phase, offset) of each tap, and all offsets in ascending order."""
  taps = []
  for tap in range(size):
    phase = (tap - size // 2) % stride
    taps.append((phase, (phase - tap + size // 2) // stride))
  return taps, sorted({offset for _, offset in taps})


def _gather(x, offsets, stride):
  """[B, H, W, C] -> [B, ceil(H/S), ceil(W/S), N * N * C]: x at (S u + d, S v + e), 0 outside."""
  b, h, w, c = x.shape
  low, high = -min(offsets), max(offsets)
  u, v = -(-h // stride), -(-w // stride)
  padded = jnp.pad(x, ((0, 0), (low, high), (low, high), (0, 0)))

  def shifted(d, e):
    start = (0, low + d, low + e, 0)
    limit = (b, start[1] + (u - 1) * stride + 1, start[2] + (v - 1) * stride + 1, c)
    return lax.slice(padded, start, limit, (1, stride, stride, 1))

  rows = [jnp.stack([shifted(d, e) for e in offsets], 3) for d in offsets]
  return jnp.stack(rows, 3).reshape(b, u, v, len(offsets) ** 2 * c)


def _contract(x, y):
  """Sum over every axis but the last of the outer product: [..., M], [..., N] -> [M, N]."""
  axes = tuple(range(x.ndim - 1))
  return lax.dot_general(x, y, ((axes, axes), ((), ())))


def _chunk_count(examples, elements):
  """Number of chunks of a batch whose examples have `elements` patch elements each."""
  return -(-examples // max(1, _CHUNK_ELEMENTS // elements))


def _split(x, count):
  """[B, ...] -> [count, ceil(B / count), ...], padded with zeros at the end."""
  size = -(-x.shape[0] // count)
  padded = jnp.pad(x, ((0, count * size - x.shape[0]), *[(0, 0)] * (x.ndim - 1)))
  return padded.reshape(count, size, *x.shape[1:])


def _join(x, examples):
  return x.reshape(-1, *x.shape[2:])[:examples]
