"""Weight files: exact round trips, and one clear line for every way a file can be wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from hamu_jax import models
from hamu_jax.errors import UserError

SCALE = "resnet.encoder.stages.1.layers.0.shortcut.normalization.weight"
KERNEL = "resnet.encoder.stages.2.layers.0.layer.1.convolution.weight"


OPTIONS = {
  "resnet8": {"width": 4},
  "mlp": {"hidden": (5, 3)},
  "resnet18": {"width": 2},
  "resnet50": {"width": 2},
  "vgg16_bn": {"width": 2, "stages": (1, 2)},
  "vit_s": {"width": 6, "depth": 2, "heads": 3},
}


def make_variables(name="resnet8", *, size=4, num_classes=3):
  model = models.build_model(name, num_classes=num_classes, platform="cpu", **OPTIONS[name])
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 1)))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape, np.float32)), shapes)


@pytest.fixture
def file(tmp_path):
  models.save_weights(tmp_path / "weights.safetensors", make_variables())
  return tmp_path / "weights.safetensors"


def tamper(file, change):
  tensors = safetensors.numpy.load_file(file)
  change(tensors)
  safetensors.numpy.save_file(tensors, file)


@pytest.mark.parametrize("name", OPTIONS)
def test_round_trip(tmp_path, name):
  variables = make_variables(name)
  models.save_weights(tmp_path / "one.safetensors", variables)
  loaded = models.load_weights(tmp_path / "one.safetensors", jax.eval_shape(lambda: variables))
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)
  models.save_weights(tmp_path / "two.safetensors", loaded)
  one, two = (tmp_path / f"{number}.safetensors" for number in ("one", "two"))
  assert one.read_bytes() == two.read_bytes()


def test_model_without_statistics_keeps_its_empty_collection(tmp_path):
  variables = make_variables("vit_s") | {"batch_stats": {}}
  models.save_weights(tmp_path / "one.safetensors", variables)
  assert models.load_weights(tmp_path / "one.safetensors", variables)["batch_stats"] == {}


def test_layout_is_pytorchs(file):
  tensors, variables = safetensors.numpy.load_file(file), make_variables()
  block = variables["params"]["stage2_block0"]
  kernel = np.asarray(block["conv1"]["kernel"])
  assert tensors[KERNEL].shape == (16, 16, 3, 3)
  assert tensors[KERNEL][5, 7, 0, 2] == kernel[0, 2, 7, 5]
  classifier = np.asarray(variables["params"]["classifier"]["kernel"])
  np.testing.assert_array_equal(tensors["classifier.1.weight"], classifier.T)
  assert tensors["resnet.embedder.norm.num_batches_tracked"].dtype == np.int64


def test_folder_and_dtype(file, x64):
  file.rename(file.parent / "model.safetensors")
  template = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64), jax.eval_shape(make_variables)
  )
  loaded = models.load_weights(file.parent, template)
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float64)}


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda tensors: tensors.pop(SCALE), rf"{SCALE}' is missing"),
    (lambda tensors: tensors.update({"more": np.zeros(3)}), "'more' is unknown"),
    (
      lambda tensors: tensors.update({SCALE: np.zeros(9)}),
      rf"{SCALE}' has shape \(9,\).*\(8,\)",
    ),
    (
      lambda tensors: tensors.update({KERNEL: tensors[KERNEL].transpose(2, 3, 1, 0).copy()}),
      rf"{KERNEL}' has shape \(3, 3, 16, 16\).*\(16, 16, 3, 3\)",
    ),
  ],
)
def test_wrong_tensors(file, change, message):
  tamper(file, change)
  with pytest.raises(UserError, match=message):
    models.load_weights(file, make_variables())


@pytest.mark.parametrize(
  "name, other, message",
  [
    ("resnet18", {"num_classes": 7}, r"'fc.bias' has shape \(3,\).*has \(7,\)"),
    ("vgg16_bn", {"num_classes": 7}, r"'classifier.bias' has shape \(3,\).*has \(7,\)"),
    ("vit_s", {"num_classes": 7}, r"'head.bias' has shape \(3,\).*has \(7,\)"),
    ("vit_s", {"size": 8}, r"'pos_embed' has shape \(1, 2, 6\).*has \(1, 5, 6\)"),
  ],
)
def test_checkpoint_for_other_classes_or_images(tmp_path, name, other, message):
  models.save_weights(tmp_path / "weights.safetensors", make_variables(name))
  with pytest.raises(UserError, match=message):
    models.load_weights(tmp_path / "weights.safetensors", make_variables(name, **other))


def test_checkpoint_of_another_model(file):
  with pytest.raises(UserError, match="'layer1.0.bn1.running_mean' is missing.*give a file of this model"):
    models.load_weights(file, make_variables("resnet18"))


def test_counters_are_optional(file):
  tamper(file, lambda tensors: [tensors.pop(k) for k in list(tensors) if "num_batches" in k])
  jax.tree.map(np.testing.assert_array_equal, models.load_weights(file, make_variables()), make_variables())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_wrappers_of_pytorch_gave(file, prefix):
  def rename(tensors):
    for name in list(tensors):
      tensors[prefix + name] = tensors.pop(name)

  tamper(file, rename)
  jax.tree.map(np.testing.assert_array_equal, models.load_weights(file, make_variables()), make_variables())
  tamper(file, lambda tensors: tensors.update({min(tensors).removeprefix(prefix): tensors.pop(min(tensors))}))
  with pytest.raises(UserError, match="is missing"):
    models.load_weights(file, make_variables())


def test_types_that_numpy_lacks(file):
  """A header of safetensors that says F8_E4M3."""
  header = json.dumps({"fc.bias": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
  file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
  with pytest.raises(UserError, match="cannot be read as a safetensors file of NumPy types"):
    models.load_weights(file, make_variables())


def test_unreadable_files(tmp_path, file):
  with pytest.raises(UserError, match="no such file"):
    models.load_weights(tmp_path / "nothing.safetensors", make_variables())
  with pytest.raises(UserError, match=r"no such file.*model\.safetensors"):
    models.load_weights(tmp_path, make_variables())
  file.write_bytes(file.read_bytes()[:1000])
  with pytest.raises(UserError, match="cannot be read as a safetensors file of NumPy types"):
    models.load_weights(file, make_variables())
