"""ResNet against the reference's weights, logits, gradients and training statistics.

`golden/hamu/resnet20.npz` holds a PyTorch state dict and what the reference computed from it in
float64. Of gradients and of the HAMU step's `hamu_delta` it keeps tensors of more than 1024 values
as every fourth value of the flattened tensor, and of each whole tensor three numbers, its digest,
in the order of `names`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from hamu_jax import models
from hamu_jax.engine.sub_step import clip
from hamu_jax.errors import UserError
from hamu_jax.models import resnet
from hamu_jax.transforms import hamu

ROLES = ("retain", "forget")


@pytest.fixture(scope="module")
def reference(request):
  path = request.path.parent.parent / "golden" / "hamu" / "resnet20.npz"
  with np.load(path) as file:
    return dict(file)


@pytest.fixture
def weights(reference, tmp_path):
  """The reference's state dict as the file that a user would bring."""
  prefix = "state_dict/"
  tensors = {k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)}
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  return tmp_path / "model.safetensors"


def load(model, path, dtype):
  template = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), template)
  return models.load_weights(path, template)


def batch(reference, role, dtype):
  images = reference[f"{role}_images"].transpose(0, 2, 3, 1)
  return jnp.asarray(images, dtype), jnp.asarray(reference[f"{role}_labels"])


def cross_entropy(logits, labels):
  return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))


def in_torch_layout(tree, tmp_path):
  """Tensors of a tree like the parameters, by their PyTorch names."""
  models.save_weights(tmp_path / "tree.safetensors", tree)
  return safetensors.numpy.load_file(tmp_path / "tree.safetensors")


def subset(tensor):
  flat = tensor.reshape(-1)
  return flat[::4] if flat.size > 1024 else flat


def digest(tensor):
  flat, index = np.float64(tensor).reshape(-1), np.arange(tensor.size)
  return np.linalg.norm(flat), flat @ np.cos(index), flat @ np.sin(1.7 * index)


def check_against_reference(reference, path, tmp_path, platform, dtype, tolerance, gradient_tolerance):
  model = models.build_model("resnet20", num_classes=10, platform=platform)
  variables = load(model, path, dtype)

  @jax.jit
  def differentiate(variables, x, labels):
    def loss(params):
      logits = model.apply({**variables, "params": params}, x)
      return cross_entropy(logits, labels), logits

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])

  for role in ROLES:
    (value, logits), gradient = differentiate(variables, *batch(reference, role, dtype))
    np.testing.assert_allclose(value, reference[f"{role}_loss"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(logits, reference[f"{role}_logits"], rtol=0, atol=tolerance)
    tensors = in_torch_layout({"params": gradient}, tmp_path)
    assert set(tensors) == set(reference["names"])
    for index, name in enumerate(reference["names"]):
      tensor, whole = tensors[name], reference[f"{role}_grad/digest"][index]
      assert tensor.dtype == dtype
      # What is stored was rounded to float32.
      np.testing.assert_allclose(
        subset(tensor), reference[f"{role}_grad/{name}"], rtol=1e-6, atol=gradient_tolerance
      )
      np.testing.assert_allclose(digest(tensor), whole, rtol=0, atol=gradient_tolerance * (1 + whole[0]))


def test_reference_in_float32(reference, weights, tmp_path):
  # Rounding, which differs from processor to processor, takes an activation across the kink of a
  # ReLU and moves a gradient by 3e-3. Gradients are held to the reference in float64.
  check_against_reference(reference, weights, tmp_path, "cpu", np.float32, 1e-4, 1e-2)


@pytest.mark.parametrize("platform", ["cpu", pytest.param("tpu", marks=pytest.mark.slow)])
def test_reference_in_float64(x64, reference, weights, tmp_path, platform):
  check_against_reference(reference, weights, tmp_path, platform, np.float64, 1e-10, 1e-10)


def test_hamu_step_from_the_reference_weights(reference, weights, tmp_path):
  """hamu-q with learning rate 0.01, constraint 0.005, each role's gradient clipped to 1."""
  model = models.build_model("resnet20", num_classes=10, platform="cpu")
  variables = load(model, weights, np.float32)
  params = variables["params"]

  @jax.jit
  def gradient(x, labels):
    def loss(params):
      return cross_entropy(model.apply({**variables, "params": params}, x), labels)

    raw = jax.grad(loss)(params)
    return clip(raw, optax.tree.norm(raw), 1.0)

  retain, forget = (gradient(*batch(reference, role, np.float32)) for role in ROLES)
  optimizer = optax.chain(hamu(0.01, 0.005), optax.sgd(0.01))
  delta, _ = optimizer.update(retain, optimizer.init(params), params, forget_grads=forget)
  tensors = in_torch_layout({"params": delta}, tmp_path)
  largest = max(np.abs(reference[f"hamu_delta/{name}"]).max() for name in reference["names"])
  for name in reference["names"]:
    np.testing.assert_allclose(
      subset(tensors[name]), reference[f"hamu_delta/{name}"], rtol=0, atol=1e-4 * largest
    )


def test_reference_in_training(x64, reference, weights, tmp_path):
  model = models.build_model("resnet20", num_classes=10, platform="cpu")
  variables = load(model, weights, np.float64)
  x, labels = batch(reference, "retain", np.float64)
  run = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
  logits, updated = run(variables, x)
  np.testing.assert_allclose(logits, reference["train/logits"], rtol=0, atol=1e-11)
  np.testing.assert_allclose(cross_entropy(logits, labels), reference["train/loss"], rtol=0, atol=1e-11)
  tensors = in_torch_layout(updated, tmp_path)
  running = [name for name in tensors if "running" in name]
  assert len(running) == 2 * 21
  for name in running:
    np.testing.assert_allclose(tensors[name], reference[f"train/{name}"], rtol=1e-11)


# As HAMU's reference and torchvision's documentation count them.
@pytest.mark.parametrize(
  "name, classes, parameters",
  [
    ("resnet20", 10, 272_474),
    ("resnet50_imagenet", 1000, 25_557_032),
    ("wide_resnet50_2_imagenet", 1000, 68_883_240),
  ],
)
def test_number_of_parameters(name, classes, parameters):
  model = models.build_model(name, num_classes=classes, platform="cpu")
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_initial_weights():
  model = models.build_model("resnet18", num_classes=100, platform="tpu", width=32, stages=(1,))
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  # torchvision: kaiming_normal_(mode="fan_out", nonlinearity="relu") for every convolution.
  for kernel in (params["stem"]["kernel"], params["layer1_block0"]["conv1"]["kernel"]):
    np.testing.assert_allclose(np.std(kernel), (2 / (9 * 32)) ** 0.5, rtol=0.05)
  # PyTorch's linear layer: uniform(-1, 1) / sqrt(fan_in), the bias too.
  bound = 32**-0.5
  for leaf in params["classifier"].values():
    assert 0.9 * bound < np.max(np.abs(leaf)) <= bound
    np.testing.assert_allclose(np.std(leaf), bound / 3**0.5, rtol=0.15)


def test_platforms_agree_on_any_shape(x64):
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 11, 2)))

  def build(platform):
    return models.build_model("resnet8", num_classes=5, width=4, platform=platform)

  variables = jax.jit(build("tpu").init)(jax.random.key(1), x)

  def gradients(platform):
    model = build(platform)

    def loss(params, stats, x):
      logits = model.apply({"params": params, "batch_stats": stats}, x)
      assert logits.shape == (2, 5)
      return jnp.sum(jnp.sin(logits))

    return jax.jit(jax.grad(loss))(variables["params"], variables["batch_stats"], x)

  own, plain = gradients("cpu"), gradients("tpu")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), own, plain)


def test_platform_decides_the_gradients_of_convolutions():
  """On a CPU all have the form for which XLA calls its libraries: channels last, no reversed kernel."""
  x = jnp.zeros((2, 8, 8, 1))
  for platform in ("cpu", "tpu"):
    model = models.build_model("resnet8", num_classes=3, platform=platform)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    gradient = jax.grad(lambda variables, x, model=model: jnp.sum(model.apply(variables, x)), (0, 1))
    text = jax.jit(gradient).lower(variables, x).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    fast = ["[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in each and "true" not in each for each in lines]
    assert lines and all(fast) == (platform == "cpu")


@pytest.mark.parametrize("depth", [2, 19, 21])
def test_impossible_depth(depth):
  with pytest.raises(UserError, match=f"depth={depth}.*6n"):
    resnet.ResNet(num_classes=3, platform="cpu", depth=depth)
