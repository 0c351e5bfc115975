"""VGG with batch normalisation.

Source: Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition
(2015), configuration D, as torchvision builds it. For small images the classifier is a single linear layer,
as in SalUn and RUM.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hamu_jax.errors import UserError
from hamu_jax.models.batch_norm import Axes
from hamu_jax.models.conv_norm import ConvNorm

# Number of positions along each axis to which the features are pooled before the hidden layers.
_POOLED = 7
# Number of modules of a convolution and of a pooling in torchvision's `features`.
_CONV_MODULES, _POOL_MODULES = 3, 1
# Distance of two linear layers in torchvision's classifier, with ReLU and dropout between them.
_LINEAR_MODULES = 3
_LINEAR_INIT = nn.initializers.normal(0.01)

TORCH_NAMES = (
  (r"features(\d+)", r"features.\1"),
  (r"features(\d+)/norm", lambda match: f"features.{int(match[1]) + 1}"),
  ("classifier", "classifier"),
  (r"classifier(\d+)", r"classifier.\1"),
)


class VGG(nn.Module):
  """Stages of 3x3 convolutions, each followed by max pooling, then linear layers.

  Without hidden layers the features are averaged over all positions, with them over 7x7 regions.
  torchvision applies dropout of 1/2 to each hidden layer in training. This model has no dropout, because a
  forward pass here draws no random numbers.

  Attributes:
    num_classes: number of outputs.
    platform: see `convolve`.
    hidden: widths of the hidden linear layers.
    stages: number of convolutions in each stage.
    width: number of channels of the first stage; it doubles from stage to stage, up to 8 times `width`.
    dtype: type of the computation; None promotes the types of inputs and parameters.
  """

  num_classes: int
  platform: str
  hidden: tuple[int, ...] = ()
  stages: tuple[int, ...] = (2, 2, 3, 3, 3)
  width: int = 64
  dtype: Any = None

  @nn.compact
  def __call__(
    self,
    x_BxHxWxC: jax.Array,
    *,
    train: bool = False,
    mask: jax.Array | None = None,
    axis_name: Axes = None,
  ) -> jax.Array:
    """Returns logits [B, num_classes]; for the arguments see `ResNet`.

    Raises:
      UserError: if the images are too small to be halved in each stage.
    """
    height, width = x_BxHxWxC.shape[1:3]
    least = 2 ** len(self.stages)
    if min(height, width) < least:
      raise UserError(
        f"images of {height}x{width}: this VGG halves them {len(self.stages)} times and needs "
        f"{least}x{least} at least; set another config.model.name"
      )
    x, index = x_BxHxWxC, 0
    for stage, convolutions in enumerate(self.stages):
      for _ in range(convolutions):
        x = nn.relu(
          ConvNorm(
            self.width * min(2**stage, 8),
            self.platform,
            use_bias=True,
            dtype=self.dtype,
            name=f"features{index}",
          )(x, train=train, mask=mask, axis_name=axis_name)
        )
        index += _CONV_MODULES
      x = nn.max_pool(x, (2, 2), (2, 2))
      index += _POOL_MODULES
    return self._classify(x)

  def _classify(self, x_BxHxWxC):
    if not self.hidden:
      x_BxF = jnp.mean(x_BxHxWxC, (1, 2))
      self.sow("intermediates", "features", x_BxF)
      return self._linear(self.num_classes, "classifier")(x_BxF)
    x = _pool(x_BxHxWxC)
    # PyTorch flattens with the channel as the first axis.
    x_BxF = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
    for index, width in enumerate(self.hidden):
      x_BxF = nn.relu(self._linear(width, f"classifier{_LINEAR_MODULES * index}")(x_BxF))
    self.sow("intermediates", "features", x_BxF)
    return self._linear(self.num_classes, f"classifier{_LINEAR_MODULES * len(self.hidden)}")(x_BxF)

  def _linear(self, features, name):
    return nn.Dense(features, dtype=self.dtype, kernel_init=_LINEAR_INIT, name=name)


def _pool(x_BxHxWxC):
  """PyTorch's `AdaptiveAvgPool2d`: output u averages rows floor(u H / 7) to ceil((u + 1) H / 7)."""
  rows_UxH, columns_VxW = (_averages(size, x_BxHxWxC.dtype) for size in x_BxHxWxC.shape[1:3])
  # At 7x7 positions this is the identity; the precision keeps it so on hardware that rounds products.
  return jnp.einsum("uh,vw,bhwc->buvc", rows_UxH, columns_VxW, x_BxHxWxC, precision=lax.Precision.HIGHEST)


def _averages(size, dtype):
  """The weight of each position in each average, [7, size]."""
  matrix = np.zeros((_POOLED, size), dtype)
  for row in range(_POOLED):
    first, last = row * size // _POOLED, math.ceil((row + 1) * size / _POOLED)
    matrix[row, first:last] = 1 / (last - first)
  return matrix
