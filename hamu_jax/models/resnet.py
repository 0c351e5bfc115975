"""Residual networks: the ResNet-20 family for small images, ResNet-18, 34 and 50, and Wide ResNet-50-2.

Source: He et al., Deep Residual Learning for Image Recognition (2016). ResNet-20 is the model of section 4.2
with projection shortcuts, as HAMU's reference builds it from Hugging Face's ResNet. ResNet-18, 34
and 50 are the models of section 4.1, as torchvision builds them. Wide ResNet-50-2 is that of Zagoruyko and
Komodakis, Wide Residual Networks (2016), as torchvision builds it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hamu_jax.errors import UserError
from hamu_jax.models.batch_norm import Axes
from hamu_jax.models.conv_norm import ConvNorm

# PyTorch's default of `uniform(-1, 1) / sqrt(fan_in)` for a linear layer.
_LINEAR_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

_SMALL_STAGES = 3
# Ratio of the outputs of a bottleneck block to its inner width.
_EXPANSION = 4
# {depth: (blocks in each stage, whether they are bottlenecks)}.
_DEPTHS = {
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
}

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

_LAYER = r"layer(\d+)_block(\d+)/"
TORCHVISION_NAMES = (
  ("stem", "conv1"),
  ("stem/norm", "bn1"),
  (_LAYER + r"conv(\d)", lambda match: _in_torchvision_block(match, "conv")),
  (_LAYER + r"conv(\d)/norm", lambda match: _in_torchvision_block(match, "bn")),
  (_LAYER + "shortcut", r"layer\1.\2.downsample.0"),
  (_LAYER + "shortcut/norm", r"layer\1.\2.downsample.1"),
  ("classifier", "fc"),
)


def _in_torchvision_block(match, kind):
  """Name of a module in torchvision, which counts the convolutions of a block from 1."""
  return f"layer{match[1]}.{match[2]}.{kind}{int(match[3]) + 1}"


class ResidualBlock(nn.Module):
  """`relu(residual(x) + shortcut(x))`; the shortcut is a projection if the shape changes.

  The residual is two 3x3 convolutions with a ReLU between them or, as a bottleneck, a 1x1, a 3x3
  and a 1x1 convolution to four times the channels. The first 3x3 convolution has the stride. For a
  bottleneck this is torchvision's v1.5; the paper puts the stride on the 1x1 convolution.

  Attributes:
    features: number of channels; of a bottleneck, the inner number.
    platform: see `convolve`.
    stride: stride of the block.
    bottleneck: whether the residual is a bottleneck.
    widening: factor of the inner number of channels of a bottleneck, which does not change its outputs.
    dtype: type of the computation; None promotes the types of inputs and parameters.
  """

  features: int
  platform: str
  stride: int = 1
  bottleneck: bool = False
  widening: int = 1
  dtype: Any = None

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array, **mode) -> jax.Array:
    """See `ConvNorm`, which receives the keyword arguments."""

    def conv_norm(name, features, size=3, stride=1):
      return ConvNorm(features, self.platform, size, stride, dtype=self.dtype, name=name)

    features, outputs = self.features, self.features
    if self.bottleneck:
      features, outputs = features * self.widening, outputs * _EXPANSION
      y = nn.relu(conv_norm("conv0", features, 1)(x_BxHxWxC, **mode))
      y = nn.relu(conv_norm("conv1", features, stride=self.stride)(y, **mode))
      y = conv_norm("conv2", outputs, 1)(y, **mode)
    else:
      y = nn.relu(conv_norm("conv0", features, stride=self.stride)(x_BxHxWxC, **mode))
      y = conv_norm("conv1", outputs)(y, **mode)
    if self.stride != 1 or x_BxHxWxC.shape[-1] != outputs:
      x_BxHxWxC = conv_norm("shortcut", outputs, 1, self.stride)(x_BxHxWxC, **mode)
    return nn.relu(x_BxHxWxC + y)


class ResNet(nn.Module):
  """3x3 stem, three stages of basic blocks at 1, 2 and 4 times the width, mean, linear classifier.

  Attributes:
    num_classes: number of outputs.
    platform: see `convolve`.
    depth: number of layers, 6n + 2 for n blocks in each stage.
    width: number of channels of the stem and the first stage.
    dtype: type of the computation; None promotes the types of inputs and parameters.
  """

  num_classes: int
  platform: str
  depth: int = 20
  width: int = 16
  dtype: Any = None

  def __post_init__(self):
    super().__post_init__()
    if self.depth < 8 or self.depth % 6 != 2:
      raise UserError(
        f"depth={self.depth}: a ResNet for small images has 6n + 2 layers; choose 8, 14, 20, ..."
      )

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
      train: whether batch norm uses the statistics of this batch; if not, it uses the running averages.
      mask: [B], zero for padding, which does not enter the statistics; None counts all examples.
      axis_name: mapped axis or axes of the devices over which the statistics are computed.
    """
    mode: dict[str, Any] = {"train": train, "mask": mask, "axis_name": axis_name}
    x = ConvNorm(self.width, self.platform, dtype=self.dtype, name="stem")(x_BxHxWxC, **mode)
    x = nn.relu(x)
    blocks = (self.depth - 2) // (2 * _SMALL_STAGES)
    for stage in range(_SMALL_STAGES):
      x = _stage(self, x, stage, blocks, f"stage{stage}", False, mode)
    return _classify(self, x)


class TorchvisionResNet(nn.Module):
  """torchvision's ResNet-18, 34 and 50 and Wide ResNet-50-2: four stages at 1, 2, 4 and 8 times the width.

  The stem for small images keeps their height and width; ImageNet's stem reduces both to a quarter.

  Attributes:
    num_classes: number of outputs.
    platform: see `convolve`.
    depth: 18 or 34 for basic blocks, 50 for bottlenecks.
    imagenet_stem: whether the stem is ImageNet's: 7x7 with stride 2, then 3x3 max pooling with stride 2. If
      not, it is 3x3 with stride 1.
    width: number of channels of the stem and of the first stage; of bottlenecks, the inner number.
    stages: number of blocks in each stage; None takes the depth's.
    widening: factor of the inner number of channels of bottlenecks, 2 for Wide ResNet-50-2.
    dtype: type of the computation; None promotes the types of inputs and parameters.
  """

  num_classes: int
  platform: str
  depth: int
  imagenet_stem: bool
  width: int = 64
  stages: tuple[int, ...] | None = None
  widening: int = 1
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
    """See `ResNet`."""
    mode: dict[str, Any] = {"train": train, "mask": mask, "axis_name": axis_name}
    stages, bottleneck = _DEPTHS[self.depth]
    size, stride = (7, 2) if self.imagenet_stem else (3, 1)
    stem = ConvNorm(self.width, self.platform, size, stride, dtype=self.dtype, name="stem")
    x = nn.relu(stem(x_BxHxWxC, **mode))
    if self.imagenet_stem:
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for stage, blocks in enumerate(self.stages or stages):
      x = _stage(self, x, stage, blocks, f"layer{stage + 1}", bottleneck, mode, self.widening)
    return _classify(self, x)


def _stage(model, x, stage, blocks, name, bottleneck, mode, widening=1):
  """Applies blocks of 2^stage times the model's width; every stage but the first halves the image."""
  for block in range(blocks):
    stride = 2 if stage > 0 and block == 0 else 1
    x = ResidualBlock(
      model.width * 2**stage,
      model.platform,
      stride,
      bottleneck,
      widening,
      dtype=model.dtype,
      name=f"{name}_block{block}",
    )(x, **mode)
  return x


def _classify(model, x_BxHxWxC):
  """Applies the mean over positions, which is sown as the model's features, and the linear classifier."""
  x_BxF = jnp.mean(x_BxHxWxC, (1, 2))
  model.sow("intermediates", "features", x_BxF)
  bound = x_BxF.shape[-1] ** -0.5
  return nn.Dense(
    model.num_classes,
    dtype=model.dtype,
    name="classifier",
    kernel_init=_LINEAR_INIT,
    bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
  )(x_BxF)
