"""A new model: pixels in rows, mixed by an MLP-Mixer.

python -m hamu_jax.main --config=docs/examples/add_model.py --workdir=runs/mixer
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hamu_jax import models
from hamu_jax.config import default_config
from hamu_jax.config.digits import on_digits


# --8<-- [start:model]
class Mixer(nn.Module):
  """MLP-Mixer (arXiv 2105.01601) whose tokens are the rows of the image.

  Attributes:
    num_classes: outputs.
    platform: what it runs on; nothing here depends on it.
    width: channels of a token.
    depth: blocks.
    dtype: of the computation; None takes the inputs' and parameters'.
  """

  num_classes: int
  platform: str
  width: int = 32
  depth: int = 2
  dtype: Any = None

  @nn.compact
  def __call__(self, x_BxHxWxC, *, train=False, mask=None, axis_name=None):
    """Returns logits [B, num_classes]."""
    # For batch norm: in training, which rows of a batch are not padding, and the devices of a role.
    del train, mask, axis_name
    rows_BxHxF = x_BxHxWxC.reshape(*x_BxHxWxC.shape[:2], -1)
    tokens_BxHxD = self._dense("embed", self.width)(rows_BxHxF)
    for block in range(self.depth):
      mixed_BxDxH = jnp.swapaxes(nn.LayerNorm(dtype=self.dtype, name=f"norm{block}")(tokens_BxHxD), 1, 2)
      mixed_BxDxH = nn.gelu(self._dense(f"mix{block}", mixed_BxDxH.shape[-1])(mixed_BxDxH))
      tokens_BxHxD += jnp.swapaxes(mixed_BxDxH, 1, 2)
      tokens_BxHxD += nn.gelu(self._dense(f"channels{block}", self.width)(tokens_BxHxD))
    features_BxD = jnp.mean(tokens_BxHxD, axis=1)
    # What `hamu_jax.analysis.geometry` looks at.
    self.sow("intermediates", "features", features_BxD)
    return self._dense("head", self.num_classes)(features_BxD)

  def _dense(self, name, features):
    return nn.Dense(features, dtype=self.dtype, name=name)


# --8<-- [end:model]


# --8<-- [start:row]
# The path of each submodule, as a regular expression, and the PyTorch module with the same weights.
TORCH_NAMES = (
  ("embed", "embed"),
  (r"norm(\d+)", r"blocks.\1.norm"),
  (r"mix(\d+)", r"blocks.\1.mix"),
  (r"channels(\d+)", r"blocks.\1.channels"),
  ("head", "head"),
)
models.MODELS["mixer"] = models.Architecture(Mixer, {}, TORCH_NAMES)
models.MODELS["mixer_deep"] = models.Architecture(Mixer, {"depth": 8}, TORCH_NAMES)
# --8<-- [end:row]


def get_config():
  """The digit 0 is to be forgotten."""
  config = on_digits(default_config(), "mixer", width=24)
  config.data.update(forget="class", forget_class=(0,))
  config.method.update(epochs=4.0, constraint_ratio=0.1, on_infeasible="project")
  return config


def count_parameters(name):
  """The number of parameters of a registered model on 8x8 grey images."""
  model = models.build_model(name, num_classes=10)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
