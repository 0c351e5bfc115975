"""ViT's initial weights and limits; `test_torch.py` holds its logits to timm's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax import models
from hamu_jax.errors import UserError


def test_initial_weights():
  model = models.build_model("vit_s", num_classes=100, depth=1)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  # timm: trunc_normal_(std=0.02) for linear layers and positions, normal_(std=1e-6) for the token.
  for name in ("qkv", "proj", "fc1", "fc2"):
    np.testing.assert_allclose(np.std(params["block0"][name]["kernel"]), 0.02, rtol=0.02)
    assert not np.any(params["block0"][name]["bias"])
  np.testing.assert_allclose(np.std(params["head"]["kernel"]), 0.02, rtol=0.02)
  np.testing.assert_allclose(np.std(params["pos_embed"]), 0.02, rtol=0.02)
  np.testing.assert_allclose(np.std(params["cls_token"]), 1e-6, rtol=0.1)
  # PyTorch's convolution: uniform(-1, 1) / sqrt(fan_in).
  bound = (4 * 4 * 3) ** -0.5
  for leaf in params["patch_embed"].values():
    assert 0.95 * bound < np.max(np.abs(leaf)) <= bound
    np.testing.assert_allclose(np.std(leaf), bound / 3**0.5, rtol=0.1)


def test_images_that_cannot_be_cut():
  model = models.build_model("vit_s_imagenet", num_classes=3)
  with pytest.raises(UserError, match="32x40.*16x16.*multiples of 16"):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 40, 3)))


def test_width_that_heads_cannot_share():
  with pytest.raises(UserError, match="width=50.*multiple of heads=6"):
    models.build_model("vit_s", num_classes=3, width=50)
