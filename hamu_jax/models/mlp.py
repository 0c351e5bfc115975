"""A multilayer perceptron, the smallest model: for tests, notebooks and short runs."""

from typing import Any

import flax.linen as nn
import jax

TORCH_NAMES = ((r"hidden(\d+)", r"hidden.\1"), ("classifier", "classifier"))


class MLP(nn.Module):
  """Flattened pixels, hidden layers with ReLU, a linear classifier; no batch norm.

  Attributes:
    num_classes: number of outputs.
    platform: ignored, because matrix products are fast on every platform.
    hidden: widths of the hidden layers.
    dtype: type of the computation; None promotes the types of inputs and parameters.
  """

  num_classes: int
  platform: str
  hidden: tuple[int, ...] = (64,)
  dtype: Any = None

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
    x_BxF = x_BxHxWxC.reshape(x_BxHxWxC.shape[0], -1)
    for index, width in enumerate(self.hidden):
      x_BxF = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"hidden{index}")(x_BxF))
    self.sow("intermediates", "features", x_BxF)
    return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x_BxF)
