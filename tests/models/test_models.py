"""The registry, and what holds for every model in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax import models
from hamu_jax.errors import UserError

# One small model of each kind.
SMALL = {
  "resnet8": {"width": 4},
  "resnet18": {"width": 4, "stages": (1, 1)},
  "resnet50_imagenet": {"width": 2, "stages": (1, 1)},
  "wide_resnet50_2": {"width": 2, "stages": (1, 1)},
  "vgg16_bn": {"width": 4, "stages": (1, 1)},
  "vgg16_bn_imagenet": {"width": 1, "stages": (1,)},
  "vit_s": {"width": 6, "depth": 1, "heads": 2},
  "mlp": {},
}


def draw_variables(model, x):
  """Random variables in float64; initial ones take seconds to compile."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  assert set(shapes) <= {"params", "batch_stats"}
  return {
    collection: jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape)), shapes[collection])
    for collection, draw in (("params", rng.standard_normal), ("batch_stats", rng.random))
    if collection in shapes
  }


def test_unknown_name_is_answered_with_the_nearest():
  with pytest.raises(UserError, match="'resnt20'.*'resnet20'.*resnet8.*mlp"):
    models.build_model("resnt20", num_classes=10)


def test_unknown_option_is_answered_with_the_choices():
  with pytest.raises(UserError, match="widht=3: model 'resnet20' has no such option; .*width"):
    models.build_model("resnet20", num_classes=10, widht=3)
  with pytest.raises(UserError, match="depth=8"):
    models.build_model("resnet20", num_classes=10, depth=8)


def test_platform_defaults_to_the_backend():
  assert models.build_model("resnet20", num_classes=10).platform == jax.default_backend()
  assert models.build_model("resnet20", num_classes=10, platform="tpu").platform == "tpu"


@pytest.mark.parametrize("name", ["resnet8", "resnet32", "resnet110"])
def test_depth_is_in_the_name(name):
  assert models.build_model(name, num_classes=10).depth == int(name.removeprefix("resnet"))


@pytest.mark.parametrize("name", ["resnet8", "mlp"])
def test_features_are_what_the_classifier_reads(x64, name):
  """Those of the other models are held to torchvision's and timm's in `test_torch.py`."""
  model = models.build_model(name, num_classes=3, platform="tpu", **SMALL[name])
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 1)))
  variables = draw_variables(model, x)

  @jax.jit
  def run(variables):
    return model.apply(variables, x), model.apply(variables, x, mutable=["intermediates"])

  plain, (logits, updated) = run(variables)
  assert set(updated) == {"intermediates"}
  (features,) = updated["intermediates"]["features"]
  classifier = jax.tree.map(np.asarray, variables["params"]["classifier"])
  expected = np.asarray(features) @ classifier["kernel"] + classifier["bias"]
  np.testing.assert_allclose(logits, expected, rtol=1e-12)
  np.testing.assert_array_equal(logits, plain)


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50_imagenet", "vgg16_bn"])
def test_neither_padding_nor_devices_change_training(x64, name):
  model = models.build_model(name, num_classes=3, platform="tpu", **SMALL[name])
  x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 8, 8, 1)))
  variables = draw_variables(model, x)

  def run(x, mask=None, axis_name=None):
    return model.apply(variables, x, train=True, mask=mask, axis_name=axis_name, mutable=["batch_stats"])

  whole, expected = jax.jit(run)(x[:4])
  halved = jax.vmap(functools.partial(run, axis_name="device"), axis_name="device")
  logits, updated = jax.jit(halved)(x.reshape(2, 3, 8, 8, 1), jnp.array([[1, 1, 1], [1, 0, 0]]))
  np.testing.assert_allclose(logits.reshape(6, 3)[:4], whole, rtol=1e-9)
  for device in range(2):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[device], b, rtol=1e-9), updated, expected)


@pytest.mark.parametrize("name", SMALL)
def test_computes_in_bfloat16_with_float32_parameters(name):
  model = models.build_model(name, num_classes=3, dtype=jnp.bfloat16, **SMALL[name])
  x = jnp.ones((2, 8, 8, 1))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  assert jax.eval_shape(model.apply, variables, x).dtype == jnp.bfloat16
