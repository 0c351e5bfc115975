"""Landscapes against the reference's golden numbers, a quadratic in closed form, and symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from sam_jax import landscape

# Tensors in the order of the golden flat vectors, with their shapes in PyTorch's layout.
SHAPES = {
  "mlp": {"fc1": (16, 8), "fc1_bias": (16,), "fc2": (10, 16), "fc2_bias": (10,)},
  "conv": {
    "conv1": (4, 3, 3, 3),
    "scale1": (4,),
    "shift1": (4,),
    "conv2": (6, 4, 3, 3),
    "scale2": (6,),
    "shift2": (6,),
    "fc": (10, 6),
    "fc_bias": (10,),
  },
}
# From PyTorch's order of axes to ours, by rank.
LAYOUTS = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}


def _tree(net, flat):
  tree, start = {}, 0
  for name, shape in SHAPES[net].items():
    size = int(np.prod(shape))
    tensor = flat[start : start + size].reshape(shape)
    tree[name] = jnp.asarray(tensor.transpose(LAYOUTS[len(shape)]))
    start += size
  assert start == len(flat)
  return tree


def _flat(tree):
  """The tree as a vector in its own layout, so that two trees can be compared."""
  return np.concatenate([np.ravel(tree[name]) for name in sorted(tree)])


def _mlp(p, buffers, x_BxF):
  del buffers
  return jax.nn.relu(x_BxF @ p["fc1"] + p["fc1_bias"][None]) @ p["fc2"] + p["fc2_bias"][None]


def _conv(p, buffers, x_BxCxHxW):
  """With batch norm in evaluation mode, and an average pool over 2x2 between the convolutions."""
  x = x_BxCxHxW.transpose(0, 2, 3, 1)

  def block(x, layer):
    x = lax.conv_general_dilated(
      x, p[f"conv{layer}"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    factor = p[f"scale{layer}"] / np.sqrt(buffers[f"conv/var{layer}"] + 1e-5)
    shift = p[f"shift{layer}"] - buffers[f"conv/mean{layer}"] * factor
    return jax.nn.relu(x * factor.reshape(1, 1, 1, -1) + shift.reshape(1, 1, 1, -1))

  x = block(x, 1)
  x = block(x.reshape(x.shape[0], 3, 2, 3, 2, 4).mean((2, 4)), 2)
  return x.mean((1, 2)) @ p["fc"] + p["fc_bias"][None]


APPLY = {"mlp": _mlp, "conv": _conv}


@pytest.fixture
def stored(golden):
  """-> function: the named golden array."""
  with np.load(golden / "sam" / "evaluation.npz", allow_pickle=False) as arrays:
    yield lambda name: arrays[name]


@pytest.mark.parametrize("net", SHAPES)
def test_golden(x64, golden, stored, net):
  """Directions of the reference's form, the grid around the model, and its flatness."""
  get = lambda name: stored(f"landscape/{net}/{name}")
  params = _tree(net, get("params"))
  draws = _tree(net, get("raw0")), _tree(net, get("raw1"))
  plane = landscape.scale_draws(params, *draws, normalization="tensor")
  for direction, name in zip(plane, ("direction0", "direction1")):
    np.testing.assert_allclose(_flat(direction), _flat(_tree(net, get(name))), atol=1e-9)

  with np.load(golden / "sam" / "landscape_buffers.npz", allow_pickle=False) as arrays:
    buffers = dict(arrays)

  def loss(p):
    """The mean over batches of 8, 8 and 4 of their mean."""
    log_probs = jax.nn.log_softmax(APPLY[net](p, buffers, jnp.asarray(get("x"))))
    losses = -jnp.take_along_axis(log_probs, get("y")[:, None], axis=1)[:, 0]
    return sum(losses[rows].mean() for rows in (slice(0, 8), slice(8, 16), slice(16, 20))) / 3

  losses = landscape.loss_grid(loss, params, plane, get("alphas"), get("betas"))
  np.testing.assert_allclose(losses, get("losses"), atol=1e-9)
  _assert_flatness(landscape.flatness(losses), lambda name: get(f"flatness_{name}"))


def test_golden_flatness(stored):
  value = landscape.flatness(stored("flatness25/losses"))
  _assert_flatness(value, lambda name: stored(f"flatness25/{name}"))


def _assert_flatness(value, get):
  assert value.variability == pytest.approx(float(get("variability")), rel=1e-9)
  assert value.gradient == pytest.approx(float(get("grad_norm")), rel=1e-9)
  assert value.basin == pytest.approx(float(get("basin_ratio")))
  assert value.profile == pytest.approx(get("stability_profile"))


# Directions


SHAPES_OF_PARAMS = {"kernel": (3, 3, 2, 5), "bias": (5,), "dense": (5, 4), "zeros": (4, 2)}


def _normal(seed):
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES_OF_PARAMS.items()}


def _params():
  """Filters of very different lengths; the kernel's first and the last tensor are zero."""
  params = _normal(0)
  kernel = params["kernel"] * jnp.arange(5.0).reshape(1, 1, 1, 5)
  return params | {"kernel": kernel, "zeros": jnp.zeros((4, 2))}


def test_a_filter_direction_has_the_length_of_its_filter(x64):
  params = _params()
  for direction in landscape.directions(params, jax.random.key(1)):
    for name, axes in (("kernel", (0, 1, 2)), ("dense", 0)):
      np.testing.assert_allclose(
        np.linalg.norm(np.reshape(direction[name], (-1, params[name].shape[-1])), axis=0),
        np.sqrt(np.sum(np.square(params[name]), axes)),
        rtol=1e-12,
      )
    assert not direction["bias"].any() and not direction["zeros"].any()


def test_a_filter_direction_points_along_its_draw(x64):
  params = _params()
  first = _normal(1)
  scaled, _ = landscape.scale_draws(params, first, _normal(2))
  for index in range(1, 5):
    drawn, got = first["kernel"][..., index].ravel(), scaled["kernel"][..., index].ravel()
    cosine = drawn @ got / np.linalg.norm(drawn) / np.linalg.norm(got)
    assert cosine == pytest.approx(1, abs=1e-12)


def test_directions_of_the_tensor_form_are_orthogonal_in_every_tensor(x64):
  params = _params()
  first, second = landscape.directions(params, jax.random.key(3), normalization="tensor")
  for name, tensor in params.items():
    assert abs(jnp.vdot(first[name], second[name])) < 1e-12 * max(1, jnp.sum(tensor**2))
    if name in ("kernel", "dense"):
      length = np.linalg.norm(np.ravel(first[name]))
      assert length == pytest.approx(np.linalg.norm(np.ravel(tensor)), rel=1e-12)
    else:
      assert first[name].any()


def test_directions_depend_on_the_key_alone():
  params = _params()
  first, second = landscape.directions(params, jax.random.key(5))
  again, _ = landscape.directions(params, jax.random.key(5))
  other, _ = landscape.directions(params, jax.random.key(6))
  np.testing.assert_array_equal(first["dense"], again["dense"])
  assert not np.allclose(first["dense"], other["dense"])
  assert not np.allclose(first["dense"], second["dense"])
  # Tensors of one shape are drawn apart.
  twins = landscape.directions({"a": params["dense"], "b": params["dense"]}, jax.random.key(5))[0]
  assert not np.allclose(twins["a"], twins["b"])


def test_unknown_normalization():
  with pytest.raises(ValueError, match="normalization='layer': choose from filter, tensor"):
    landscape.directions({"w": jnp.ones((2, 2))}, jax.random.key(0), normalization="layer")


@pytest.mark.parametrize("normalization", landscape.NORMALIZATIONS)
def test_a_rescaled_relu_network_has_the_same_landscape(x64, normalization):
  """Why directions are scaled at all: (a w1, w2 / a) is the same function, as sharp as (w1, w2)."""
  rng = np.random.default_rng(0)
  x_BxF, y_B = jnp.asarray(rng.normal(size=(12, 8))), jnp.arange(12) % 10
  plain = {"fc1": jnp.asarray(rng.normal(size=(8, 16))), "fc2": jnp.asarray(rng.normal(size=(16, 10)))}
  rescaled = {"fc1": 30 * plain["fc1"], "fc2": plain["fc2"] / 30}
  loss = lambda p: (
    -jnp.mean(jax.nn.log_softmax(jax.nn.relu(x_BxF @ p["fc1"]) @ p["fc2"])[jnp.arange(12), y_B])
  )
  coordinates = np.linspace(-1, 1, 3)
  grids = [
    landscape.loss_grid(
      loss,
      params,
      landscape.directions(params, jax.random.key(9), normalization=normalization),
      coordinates,
      coordinates,
    )
    for params in (plain, rescaled)
  ]
  np.testing.assert_allclose(*grids, rtol=1e-9)


# Grids


def test_grid_of_a_quadratic(x64):
  """|w + alpha d + beta e|^2 / 2 in closed form; the first axis is beta's."""
  rng = np.random.default_rng(0)
  w, d, e = rng.normal(size=(3, 7))
  alphas, betas = np.array([-1, 0, 0.5, 1]), np.array([-2, 0, 3])
  losses = landscape.loss_grid(
    lambda p: jnp.sum(jnp.square(p["w"])) / 2,
    {"w": jnp.asarray(w)},
    ({"w": jnp.asarray(d)}, {"w": jnp.asarray(e)}),
    alphas,
    betas,
  )
  expected = [[np.sum(np.square(w + alpha * d + beta * e)) / 2 for alpha in alphas] for beta in betas]
  np.testing.assert_allclose(losses, expected, rtol=1e-12)


def test_one_program_serves_every_model_and_traces_the_loss_once():
  traces = []

  def loss(params, data):
    traces.append(None)
    return jnp.sum(jnp.square(params["w"] - data))

  @jax.jit
  def grid(params, plane, data):
    return landscape.loss_grid(
      lambda p: loss(p, data), params, plane, np.linspace(-1, 1, 25), np.linspace(-1, 1, 25)
    )

  for scale in (1.0, 2.0, 3.0):
    params = {"w": jnp.full((4, 4), scale)}
    grid(params, (params, params), jnp.full((4, 4), -scale))
  assert len(traces) == 1


# Flatness


def test_flatness_of_a_plane():
  """Losses 1..5 along one axis: gradient 1, variance 2; two fifths of the grid lie 1 away, and
  only the middle within half a deviation."""
  losses = np.tile(np.arange(1.0, 6), (5, 1))
  value = landscape.flatness(losses)
  assert value.variability == pytest.approx(np.sqrt(2))
  assert value.gradient == pytest.approx(1)
  assert value.basin == pytest.approx(20)
  assert value.profile == pytest.approx((20, 20, 60, 100))
  assert landscape.flatness(losses.T) == value


def test_a_constant_is_flat():
  assert landscape.flatness(np.full((3, 5), 2.0)) == (0, 0, 100, (100,) * 4)


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-10, 10))
def test_flatness_scales_with_the_loss(seed, scale, offset):
  losses = np.random.default_rng(seed).uniform(1, 2, (5, 7))
  value, scaled = landscape.flatness(losses), landscape.flatness(scale * losses)
  assert scaled.variability == pytest.approx(scale * value.variability)
  assert scaled.gradient == pytest.approx(scale * value.gradient)
  assert scaled.profile == pytest.approx(value.profile, abs=3)
  moved = landscape.flatness(losses + offset)
  assert moved.variability == pytest.approx(value.variability)
  assert moved.gradient == pytest.approx(value.gradient)


@pytest.mark.parametrize("shape", ((4, 5), (5, 4), (1, 5), (5,)))
def test_a_grid_without_a_middle(shape):
  with pytest.raises(ValueError, match="two odd sizes of at least 3"):
    landscape.flatness(np.ones(shape))
