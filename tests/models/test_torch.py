"""Models against torchvision's and timm's own: tensor names, logits, features, one training step.

`golden/models/make.py` wrote the numbers; its recipe makes the same weights and images here.
"""

import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from hamu_jax import models
from hamu_jax.models.vgg import VGG

# The small models of `make.py`; no option of the registry changes the hidden layers of VGG's head.
SMALL = {
  "resnet18": lambda **rest: models.build_model("resnet18", stages=(1, 1, 1, 1), **rest),
  "resnet50_imagenet": lambda **rest: models.build_model("resnet50_imagenet", stages=(1, 2, 1, 1), **rest),
  "vgg16_bn": lambda **rest: models.build_model("vgg16_bn", stages=(1, 2), width=4, **rest),
  "vgg16_bn_imagenet": lambda **rest: VGG(hidden=(12, 9), stages=(1, 2), width=4, **rest),
  "vit_s": lambda **rest: models.build_model("vit_s", width=24, depth=2, heads=3, **rest),
}
# Our names: size of the images, published model, and the tensors in which ours differs from it.
FULL = {
  "resnet18_imagenet": (224, "resnet18", {}),
  "resnet34_imagenet": (224, "resnet34", {}),
  "resnet50_imagenet": (224, "resnet50", {}),
  "vgg16_bn_imagenet": (224, "vgg16_bn", {}),
  "vit_s_imagenet": (224, "vit_small_patch16_224", {}),
  "resnet18": (32, "resnet18", {"conv1.weight": [64, 3, 3, 3]}),
  "resnet34": (32, "resnet34", {"conv1.weight": [64, 3, 3, 3]}),
  "resnet50": (32, "resnet50", {"conv1.weight": [64, 3, 3, 3]}),
  "vgg16_bn": (
    32,
    "vgg16_bn",
    {
      "classifier.weight": [1000, 512],
      "classifier.bias": [1000],
      **{f"classifier.{i}.{leaf}": None for i in (0, 3, 6) for leaf in ("weight", "bias")},
    },
  ),
  "vit_s": (
    32,
    "vit_small_patch16_224",
    {"patch_embed.proj.weight": [384, 3, 4, 4], "pos_embed": [1, 65, 384]},
  ),
}


@pytest.fixture(scope="module")
def torch(request):
  """What `make.py` defines, with its two files."""
  folder = request.path.parent.parent / "golden" / "models"
  with np.load(folder / "numbers.npz") as file:
    numbers = dict(file)
  shapes = json.loads((folder / "shapes.json").read_text())
  return runpy.run_path(str(folder / "make.py")) | {"numbers": numbers, "shapes": shapes}


@pytest.fixture
def small(torch, tmp_path, x64):
  """-> function: the model of a case, its variables from a checkpoint, and images, in float64."""
  del x64

  def build(name, platform):
    model = SMALL[name](num_classes=torch["CLASSES"], platform=platform)
    shape = (torch["BATCH"], 3, *torch["SIZES"][name])
    images = jnp.asarray(torch["recipe"]("images", shape).transpose(0, 2, 3, 1), jnp.float64)
    layout = torch["shapes"]["small"][name]
    tensors = {tensor: torch["recipe"](tensor, shape) for tensor, shape in layout.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    template = jax.eval_shape(model.init, jax.random.key(0), images)
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64), template)
    return model, models.load_weights(tmp_path, template), images

  return build


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("name", SMALL)
def test_logits_and_features(torch, small, name, platform):
  model, variables, images = small(name, platform)
  run = jax.jit(lambda *inputs: model.apply(*inputs, mutable=["intermediates"]))
  logits, updated = run(variables, images)
  assert set(updated) == {"intermediates"}
  (features,) = updated["intermediates"]["features"]
  # The softmax of the attention is in float32.
  tolerance = 1e-6 if name == "vit_s" else 1e-12
  for own, key in ((logits, "logits"), (features, "features")):
    expected = torch["numbers"][f"{name}/{key}"]
    np.testing.assert_allclose(own, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_one_step_of_training(torch, small, tmp_path):
  model, variables, images = small(torch["TRAINING"], "gpu")
  labels = jnp.arange(torch["BATCH"]) % torch["CLASSES"]

  @jax.jit
  def step(variables):
    def loss(params):
      logits, updated = model.apply(
        {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
      )
      log_probs = jax.nn.log_softmax(logits)
      return -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], 1)), (logits, updated)

    params = variables["params"]
    (value, (logits, updated)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    params = jax.tree.map(lambda w, g: w - torch["LEARNING_RATE"] * g, params, gradient)
    after = model.apply({"params": params, **updated}, images)
    return {"loss": value, "logits": logits, "logits_after": after}, gradient, updated

  numbers, gradient, updated = step(variables)

  def expect(key, value):
    expected = torch["numbers"][f"training/{key}"]
    scale = 1 + np.abs(expected).max()
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-11 * scale, err_msg=key)

  for key, value in numbers.items():
    expect(key, value)
  seen = []
  for kind, tree in (("gradient", {"params": gradient}), ("statistic", updated)):
    models.save_weights(tmp_path / "tree.safetensors", tree)
    for name, tensor in safetensors.numpy.load_file(tmp_path / "tree.safetensors").items():
      if not name.endswith("num_batches_tracked"):
        expect(f"{kind}/{name}", torch["digest"](tensor))
        seen.append(f"training/{kind}/{name}")
  assert set(seen) == {key for key in torch["numbers"] if key.count("/") == 2}


@pytest.mark.parametrize("name", FULL)
def test_full_models_have_the_published_tensors(torch, monkeypatch, tmp_path, name):
  """A file with the tensors of the published model, all of them nothing but zeros, is accepted."""
  size, published, differences = FULL[name]
  layout = torch["shapes"]["full"][published] | differences
  # Views of a single zero, and booleans to load them into: some models have half a gigabyte.
  tensors = {
    tensor: np.broadcast_to(np.zeros((), bool), shape)
    for tensor, shape in layout.items()
    if shape is not None
  }
  (tmp_path / "model.safetensors").touch()
  monkeypatch.setattr(safetensors.numpy, "load_file", lambda path: tensors)
  model = models.build_model(name, num_classes=1000, platform="cpu")
  template = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
  template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, bool), template)
  loaded = models.load_weights(tmp_path, template)
  count = sum(tensor.size for key, tensor in tensors.items() if "num_batches" not in key)
  assert sum(leaf.size for leaf in jax.tree.leaves(loaded)) == count
