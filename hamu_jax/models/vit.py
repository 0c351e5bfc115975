"""Vision transformer.

Source: Dosovitskiy et al., An Image Is Worth 16x16 Words (2021), in the small form of Steiner et
al., How to Train Your ViT? (2022), as timm builds `vit_small_patch16_224`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hamu_jax.errors import UserError

# Ratio of the width of an MLP's hidden layer to that of the model.
_MLP_RATIO = 4
_EPSILON = 1e-6
# timm truncates these normal distributions at 2, which is a hundred standard deviations.
_INIT = nn.initializers.normal(0.02)
_CLASS_TOKEN_INIT = nn.initializers.normal(1e-6)
# PyTorch's default of `uniform(-1, 1) / sqrt(fan_in)` for a convolution.
_PATCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

TORCH_NAMES = (
  # The class token and the positions are parameters of the model itself.
  ("", ""),
  ("patch_embed", "patch_embed.proj"),
  (r"block(\d+)/(norm\d)", r"blocks.\1.\2"),
  (r"block(\d+)/(qkv|proj)", r"blocks.\1.attn.\2"),
  (r"block(\d+)/(fc\d)", r"blocks.\1.mlp.\2"),
  ("norm", "norm"),
  ("head", "head"),
)


class PatchEmbedding(nn.Module):
  """A P x P convolution with stride P. It is one matrix product, because the patches are disjoint.

  Attributes:
    features: F, features of a token.
    patch: P, height and width of a patch in pixels.
    dtype: type of the computation; None promotes the types of inputs and parameters.
  """

  features: int
  patch: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, (H / P) (W / P), F].

    Raises:
      UserError: if the images cannot be divided into patches.
    """
    b, h, w, c = x_BxHxWxC.shape
    p = self.patch
    if h % p or w % p:
      raise UserError(
        f"images of {h}x{w}: this ViT divides them into patches of {p}x{p}, so both must be "
        f"multiples of {p}; set another config.model.name"
      )
    kernel_PxPxCxF = self.param("kernel", _PATCH_INIT, (p, p, c, self.features))
    bound = (p * p * c) ** -0.5
    bias_F = self.param(
      "bias", lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound), (self.features,)
    )
    x, kernel, bias_F = nn.dtypes.promote_dtype(x_BxHxWxC, kernel_PxPxCxF, bias_F, dtype=self.dtype)
    patches = x.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3).reshape(b, -1, p * p * c)
    return patches @ kernel.reshape(p * p * c, self.features) + bias_F.reshape(1, 1, -1)


class Block(nn.Module):
  """`y = x + attention(norm(x))`, then `y + mlp(norm(y))`, with the exact GELU in the MLP.

  Attributes:
    heads: number of attention heads.
    dtype: type of the computation; None promotes the types of inputs and parameters.
  """

  heads: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x_BxNxF: jax.Array) -> jax.Array:
    """[B, N, F] -> [B, N, F]."""
    b, n, f = x_BxNxF.shape
    y_BxNxF = _layer_norm("norm1", self.dtype)(x_BxNxF)
    qkv_BxNx3xHxD = _linear(3 * f, "qkv", self.dtype)(y_BxNxF).reshape(b, n, 3, self.heads, -1)
    q_BxNxHxD, k_BxNxHxD, v_BxNxHxD = jnp.unstack(qkv_BxNx3xHxD, axis=2)
    y_BxNxHxD = jax.nn.dot_product_attention(q_BxNxHxD, k_BxNxHxD, v_BxNxHxD)
    x_BxNxF += _linear(f, "proj", self.dtype)(y_BxNxHxD.reshape(b, n, f))
    y_BxNxF = _layer_norm("norm2", self.dtype)(x_BxNxF)
    y_BxNxM = nn.gelu(_linear(_MLP_RATIO * f, "fc1", self.dtype)(y_BxNxF), approximate=False)
    return x_BxNxF + _linear(f, "fc2", self.dtype)(y_BxNxM)


class ViT(nn.Module):
  """Patches and a class token with learned positions, pre-norm blocks, a linear head on the token.

  There is no dropout and no stochastic depth; both rates are 0 in timm's defaults, too. The learned positions
  fix the size of the images.

  Attributes:
    num_classes: number of outputs.
    platform: ignored, because matrix products are fast on every platform.
    patch: height and width of a patch in pixels.
    width: number of features of a token.
    depth: number of blocks.
    heads: number of attention heads.
    dtype: type of the computation; None promotes the types of inputs and parameters. The attention's
      softmax is always in float32.
  """

  num_classes: int
  platform: str
  patch: int
  width: int = 384
  depth: int = 12
  heads: int = 6
  dtype: Any = None

  def __post_init__(self):
    super().__post_init__()
    if self.width % self.heads:
      raise UserError(f"width={self.width}: choose a multiple of heads={self.heads}")

  @nn.compact
  def __call__(
    self,
    x_BxHxWxC: jax.Array,
    *,
    train: bool = False,
    mask: jax.Array | None = None,
    axis_name: str | None = None,
  ) -> jax.Array:
    """Returns logits [B, num_classes]. The keywords are ignored, because examples do not interact."""
    del train, mask, axis_name
    patches = PatchEmbedding(self.width, self.patch, self.dtype, name="patch_embed")(x_BxHxWxC)
    b, n, f = patches.shape
    token = self.param("cls_token", _CLASS_TOKEN_INIT, (1, 1, f))
    positions = self.param("pos_embed", _INIT, (1, n + 1, f))
    patches, token, positions = nn.dtypes.promote_dtype(patches, token, positions, dtype=self.dtype)
    x_BxNxF = jnp.concatenate([jnp.broadcast_to(token, (b, 1, f)), patches], 1) + positions
    for index in range(self.depth):
      x_BxNxF = Block(self.heads, self.dtype, name=f"block{index}")(x_BxNxF)
    x_BxF = _layer_norm("norm", self.dtype)(x_BxNxF[:, 0])
    self.sow("intermediates", "features", x_BxF)
    return _linear(self.num_classes, "head", self.dtype)(x_BxF)


def _layer_norm(name, dtype):
  # The fast variance is a difference of squares, which suffers from cancellation if the mean is large.
  return nn.LayerNorm(_EPSILON, dtype=dtype, use_fast_variance=False, name=name)


def _linear(features, name, dtype):
  return nn.Dense(features, dtype=dtype, kernel_init=_INIT, name=name)
