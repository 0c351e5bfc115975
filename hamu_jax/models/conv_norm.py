"""A convolution followed by batch normalisation, the building block of the convolutional models."""

from typing import Any

import flax.linen as nn
import jax

from hamu_jax.models.batch_norm import Axes, BatchNorm
from hamu_jax.models.convolution import convolve

# The same as `kaiming_normal_(mode="fan_out", nonlinearity="relu")` in torchvision and Hugging Face.
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNorm(nn.Module):
  """A convolution, then batch normalisation.

  Attributes:
    features: number of output channels.
    platform: see `convolve`.
    size: height and width of the kernel, odd.
    stride: stride of the convolution.
    use_bias: whether the convolution has a bias, as in VGG. Batch norm subtracts it again in training,
      but a checkpoint's running means include it.
    dtype: type of the computation; None promotes the types of inputs and parameters.
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
    """[B, H, W, C] -> [B, ceil(H/stride), ceil(W/stride), features]; for the keywords see `BatchNorm`."""
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
    # With frozen statistics the two layers are one linear map. The gradient of the scale follows from
    # that of the kernel without a pass over activations, and no activations between the layers are kept.
    factor, shift = (vector.reshape(1, 1, 1, -1) for vector in norm.frozen())
    if bias is not None:
      shift += bias * factor
    x, kernel, shift = nn.dtypes.promote_dtype(x_BxHxWxC, kernel * factor, shift, dtype=self.dtype)
    return convolve(x, kernel, stride=self.stride, platform=self.platform) + shift
