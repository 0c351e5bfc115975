"""ResNet-20 and its family for small images.

Source: He et al., Deep Residual Learning for Image Recognition (2016), section 4.2, with projection
shortcuts, as HAMU's reference builds it from Hugging Face's ResNet.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hamu_jax.errors import UserError
from hamu_jax.models.batch_norm import Axes, BatchNorm
from hamu_jax.models.convolution import convolve

# As Hugging Face's ResNet: `kaiming_normal_(mode="fan_out", nonlinearity="relu")` for kernels, and
# PyTorch's default of `uniform(-1, 1) / sqrt(fan_in)` for the linear layer.
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_LINEAR_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

_STAGES = 3

_BLOCK = r"stage(\d+)_block(\d+)/"
_TORCH_BLOCK = r"resnet.encoder.stages.\1.layers.\2."
TORCH_NAMES = (
    ("stem", "resnet.embedder.embedder"),
    ("stem/norm", "resnet.embedder.norm"),
    (_BLOCK + r"conv(\d)", _TORCH_BLOCK + r"layer.\3.convolution"),
    (_BLOCK + r"conv(\d)/norm", _TORCH_BLOCK + r"layer.\3.normalization"),
    (_BLOCK + "shortcut", _TORCH_BLOCK + "shortcut.convolution"),
    (_BLOCK + "shortcut/norm", _TORCH_BLOCK + "shortcut.normalization"),
    ("classifier", "classifier.1"),
)


class ConvNorm(nn.Module):
  """A convolution without bias, then batch normalisation.

  Attributes:
    features: output channels.
    platform: as of `convolve`.
    size: of the kernel, odd.
    stride: of the convolution.
    dtype: of the computation; None takes the inputs' and parameters'.
  """

  features: int
  platform: str
  size: int = 3
  stride: int = 1
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
    norm = BatchNorm(self.features, name="norm")
    if train:
      x, kernel = nn.dtypes.promote_dtype(x_BxHxWxC, kernel, dtype=self.dtype)
      x = convolve(x, kernel, stride=self.stride, platform=self.platform)
      return norm(x, train=True, mask=mask, axis_name=axis_name)
    # Frozen statistics make the two layers one linear map: the scale's gradient follows from the
    # kernel's without a pass over activations, and those between the two are never kept.
    factor, shift = (vector.reshape(1, 1, 1, -1) for vector in norm.frozen())
    x, kernel, shift = nn.dtypes.promote_dtype(
        x_BxHxWxC, kernel * factor, shift, dtype=self.dtype)
    return convolve(x, kernel, stride=self.stride, platform=self.platform) + shift


class BasicBlock(nn.Module):
  """`relu(conv(relu(conv(x))) + shortcut(x))`; the shortcut projects where the shape changes."""

  features: int
  platform: str
  stride: int = 1
  dtype: Any = None

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array, **mode) -> jax.Array:
    """As `ConvNorm`, to which the keyword arguments go."""

    def conv_norm(name, **shape):
      return ConvNorm(self.features, self.platform, dtype=self.dtype, name=name, **shape)

    y = nn.relu(conv_norm("conv0", stride=self.stride)(x_BxHxWxC, **mode))
    y = conv_norm("conv1")(y, **mode)
    if self.stride != 1 or x_BxHxWxC.shape[-1] != self.features:
      x_BxHxWxC = conv_norm("shortcut", size=1, stride=self.stride)(x_BxHxWxC, **mode)
    return nn.relu(x_BxHxWxC + y)


class ResNet(nn.Module):
  """3x3 stem, three stages of basic blocks at 1, 2 and 4 times the width, mean, linear classifier.

  Attributes:
    num_classes: outputs.
    platform: as of `convolve`.
    depth: layers, 6n + 2 with n blocks a stage.
    width: channels of the stem and the first stage.
    dtype: of the computation; None takes the inputs' and parameters'.
  """

  num_classes: int
  platform: str
  depth: int = 20
  width: int = 16
  dtype: Any = None

  def __post_init__(self):
    super().__post_init__()
    if self.depth < 8 or self.depth % 6 != 2:
      raise UserError(f"depth={self.depth}: a ResNet for small images has 6n + 2: 8, 14, 20, ...")

  @nn.compact
  def __call__(
      self,
      x_BxHxWxC: jax.Array,
      *,
      train: bool = False,
      mask: jax.Array | None = None,
      axis_name: Axes = None,
  ) -> jax.Array:
    """Returns logits [B, num_classes].

    Args:
      x_BxHxWxC: normalised images of any size and number of channels.
      train: whether batch norm uses the statistics of this batch, else the running averages.
      mask: [B], zero where an example is padding and must not enter those statistics.
      axis_name: mapped axis or axes over whose devices they are taken.
    """
    mode = {"train": train, "mask": mask, "axis_name": axis_name}
    x = ConvNorm(self.width, self.platform, dtype=self.dtype, name="stem")(x_BxHxWxC, **mode)
    x = nn.relu(x)
    for stage in range(_STAGES):
      for block in range((self.depth - 2) // (2 * _STAGES)):
        stride = 2 if stage > 0 and block == 0 else 1
        x = BasicBlock(
            self.width * 2**stage, self.platform, stride=stride, dtype=self.dtype,
            name=f"stage{stage}_block{block}",
        )(x, **mode)
    x_BxF = jnp.mean(x, (1, 2))
    bound = x_BxF.shape[-1] ** -0.5
    return nn.Dense(
        self.num_classes, dtype=self.dtype, name="classifier", kernel_init=_LINEAR_INIT,
        bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
    )(x_BxF)
