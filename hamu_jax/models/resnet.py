"""ResNet-20 and its family for small images (He et al. 2016, section 4.2)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hamu_jax.models.batch_norm import BatchNorm
from hamu_jax.models.convolution import convolve

_CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNorm(nn.Module):
  """A convolution without bias, then batch normalisation."""

  features: int
  platform: str
  size: int = 3
  stride: int = 1
  dtype: Any = None

  @nn.compact
  def __call__(self, x, *, train, mask, axis_name):
    kernel = self.param(
        "kernel", _CONV_INIT, (self.size, self.size, x.shape[-1], self.features))
    x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
    x = convolve(x, kernel, stride=self.stride, platform=self.platform)
    return BatchNorm(name="norm")(x, train=train, mask=mask, axis_name=axis_name)


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut."""

  features: int
  platform: str
  stride: int = 1
  dtype: Any = None

  @nn.compact
  def __call__(self, x, **how):
    conv = lambda name, **kw: ConvNorm(self.features, self.platform, dtype=self.dtype, name=name, **kw)
    y = nn.relu(conv("conv0", stride=self.stride)(x, **how))
    y = conv("conv1")(y, **how)
    if x.shape[-1] != self.features or self.stride != 1:
      x = conv("shortcut", size=1, stride=self.stride)(x, **how)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """3x3 stem, three stages of basic blocks at widths w, 2w, 4w, mean pooling, linear classifier."""

  num_classes: int
  platform: str
  depth: int = 20
  width: int = 16
  dtype: Any = None

  @nn.compact
  def __call__(self, x_BxHxWxC, *, train=False, mask=None, axis_name=None):
    how = dict(train=train, mask=mask, axis_name=axis_name)
    x = ConvNorm(self.width, self.platform, dtype=self.dtype, name="stem")(x_BxHxWxC, **how)
    x = nn.relu(x)
    for stage in range(3):
      for block in range((self.depth - 2) // 6):
        x = BasicBlock(self.width * 2**stage, self.platform, dtype=self.dtype,
                       stride=2 if stage > 0 and block == 0 else 1,
                       name=f"stage{stage}_block{block}")(x, **how)
    x = jnp.mean(x, (1, 2))
    return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)
