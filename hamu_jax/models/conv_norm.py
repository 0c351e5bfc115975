"""A convolution and the batch normalisation behind it, what convolutional models are made of."""

from typing import Any

import flax.linen as nn
import jax

from hamu_jax.models.batch_norm import Axes, BatchNorm
from hamu_jax.models.convolution import convolve

# As torchvision and Hugging Face: `kaiming_normal_(mode="fan_out", nonlinearity="relu")`.
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNorm(nn.Module):
  """A convolution, then batch normalisation.

  Attributes:
    features: output channels.
    platform: as of `convolve`.
    size: of the kernel, odd.
    stride: of the convolution.
    use_bias: whether the convolution has a bias, as VGG's: batch norm takes it out again in
      training, but a checkpoint's running means include it.
    dtype: of the computation; None takes the inputs' and parameters'.
  """

  features: int
  platform: str
  size: int = 3
  stride: int = 1
  use_bias: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(
    self,
    x_BxHxWxC: jax.Array,
    *,
    train: bool,
    mask: jax.Array | None = None,
    axis_name: Axes = None,
  ) -> jax.Array:
    """[B, H, W, C] -> [B, ceil(H/stride), ceil(W/stride), features]; the rest as `BatchNorm`."""
    shape = (self.size, self.size, x_BxHxWxC.shape[-1], self.features)
    kernel = self.param("kernel", _KERNEL_INIT, shape)
    bias = None
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,)).reshape(1, 1, 1, -1)
    norm = BatchNorm(self.features, name="norm")
    if train:
      x, kernel, bias = nn.dtypes.promote_dtype(x_BxHxWxC, kernel, bias, dtype=self.dtype)
      x = convolve(x, kernel, stride=self.stride, platform=self.platform)
      return norm(x if bias is None else x + bias, train=True, mask=mask, axis_name=axis_name)
    # Frozen statistics make the two layers one linear map: the scale's gradient follows from the
    # kernel's without a pass over activations, and those between the two are never kept.
    factor, shift = (vector.reshape(1, 1, 1, -1) for vector in norm.frozen())
    if bias is not None:
      shift += bias * factor
    x, kernel, shift = nn.dtypes.promote_dtype(x_BxHxWxC, kernel * factor, shift, dtype=self.dtype)
    return convolve(x, kernel, stride=self.stride, platform=self.platform) + shift
