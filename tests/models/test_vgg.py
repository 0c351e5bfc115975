"""VGG's initial weights and limits; `test_torch.py` holds its logits to torchvision's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax import models
from hamu_jax.errors import UserError
from hamu_jax.models.vgg import VGG


def test_initial_weights():
  model = VGG(num_classes=50, platform="cpu", hidden=(60,), stages=(1, 1), width=16)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  # torchvision: kaiming_normal_(fan_out) for convolutions, normal_(0, 0.01) for linear layers.
  stds = {"features4": (2 / (9 * 32)) ** 0.5, "classifier0": 0.01, "classifier3": 0.01}
  for name, std in stds.items():
    np.testing.assert_allclose(np.std(params[name]["kernel"]), std, rtol=0.05)
    assert not np.any(params[name]["bias"])


def test_images_too_small_to_be_halved():
  model = models.build_model("vgg16_bn", num_classes=3)
  with pytest.raises(UserError, match="32x31.*5 times.*32x32 at least"):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 31, 3)))
