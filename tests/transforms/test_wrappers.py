"""The transforms in every dtype and inside each wrapper of optax: right, or an error that says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sam_jax
from hamu_jax.errors import UserError
from hamu_jax.transforms import combine, gru, hamu, pcgrad

TRANSFORMS = {
  "hamu": lambda: hamu(0.1, 0.01),
  "hamu-u": lambda: hamu(0.1, 0.01, variant="hamu-u"),
  "global": lambda: hamu(0.1, 0.01, scope="global"),
  "gru": gru,
  "pcgrad": pcgrad,
  "average": combine.average,
  "add": combine.add,
}
each_transform = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)


def _tree(seed, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return {
    "a": jnp.asarray(rng.standard_normal((3, 4)), dtype),
    "b": {"c": jnp.asarray(rng.standard_normal(5), dtype)},
  }


PARAMS, RETAIN, FORGET = map(_tree, range(3))


def _updates(transform, retain=RETAIN, forget=FORGET, params=PARAMS):
  state = transform.init(params)
  return transform.update(retain, state, params, forget_grads=forget)[0]


def _alone(make, key):
  """What the transform makes of one tensor alone."""
  (update,) = jax.tree.leaves(_updates(make(), *({key: tree[key]} for tree in (RETAIN, FORGET, PARAMS))))
  return update


def _assert_same(found, expected, **tolerance):
  for left, right in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(left, right, **({"rtol": 1e-6} | tolerance))


@each_transform
@pytest.mark.parametrize("compile", [lambda function: function, jax.jit])
def test_masked(make, compile):
  """Unmasked tensors as if there were no others; masked ones pass."""
  transform = optax.masked(make(), {"a": True, "b": {"c": False}})
  _assert_same(compile(lambda: _updates(transform))(), {"a": _alone(make, "a"), "b": RETAIN["b"]})
  everything = optax.masked(make(), {"a": True, "b": {"c": True}})
  _assert_same(_updates(everything), _updates(make()))
  nothing = optax.masked(make(), {"a": False, "b": {"c": False}})
  _assert_same(_updates(nothing), RETAIN)


@each_transform
@pytest.mark.parametrize("wrap", [optax.partition, optax.multi_transform])
def test_parts(make, wrap):
  """Each part by itself, with its own optimizer; one part has no tensors."""
  parts = {
    "x": optax.chain(make(), optax.sgd(0.5)),
    "y": optax.chain(make(), optax.sgd(0.25)),
    "empty": make(),
  }
  found = _updates(wrap(parts, {"a": "x", "b": {"c": "y"}}))
  _assert_same(found, {"a": -0.5 * _alone(make, "a"), "b": {"c": -0.25 * _alone(make, "b")}})


@each_transform
def test_multi_steps(make):
  transform = optax.MultiSteps(optax.chain(make(), optax.sgd(0.1)), 2)
  with pytest.raises(
    UserError, match="inside optax.MultiSteps, which would average the retain gradients alone; "
  ):
    _updates(transform)


@each_transform
def test_multi_steps_around_the_optimizer(make):
  """The remedy of the error: updates of two steps are averaged."""
  transform = optax.chain(make(), optax.MultiSteps(optax.sgd(0.1), 2))
  state = transform.init(PARAMS)
  for retain, forget in ((RETAIN, FORGET), (FORGET, RETAIN)):
    found, state = transform.update(retain, state, PARAMS, forget_grads=forget)
  steps = _updates(make()), _updates(make(), FORGET, RETAIN)
  _assert_same(found, jax.tree.map(lambda *each: -0.1 * sum(each) / 2, *steps), atol=1e-7)


@each_transform
def test_apply_if_finite(make):
  """NaN in the forget gradient never reaches the parameters: HAMU stops, others name its place."""
  broken = jax.tree.map(lambda x: x * jnp.nan, FORGET)
  around = optax.apply_if_finite(optax.chain(make(), optax.sgd(0.1)), 3)
  inside = optax.chain(make(), optax.apply_if_finite(optax.sgd(0.1), 3))
  expected = jax.tree.map(lambda x: -0.1 * x, _updates(make()))
  _assert_same(_updates(inside), expected)
  _assert_same(_updates(inside, forget=broken), jax.tree.map(jnp.zeros_like, RETAIN))
  if make in (TRANSFORMS["hamu"], TRANSFORMS["hamu-u"], TRANSFORMS["global"]):
    _assert_same(_updates(around), expected)
    _assert_same(_updates(around, forget=broken), jax.tree.map(jnp.zeros_like, RETAIN))
  else:
    with pytest.raises(
      UserError, match="inside optax.apply_if_finite, which would look at the retain .* alone"
    ):
      _updates(around)


@pytest.mark.parametrize(
  "factory, options",
  [
    (hamu, {"learning_rate": 0.1, "constraint": 0.01}),
    (hamu, {"learning_rate": optax.constant_schedule(0.1), "constraint": 0.01, "radius": 0.5}),
    (hamu, {"learning_rate": 0.1, "constraint": 0.01, "normalize_share": False, "on_infeasible": "project"}),
    (gru, {"max_norm": 0.5}),
    (pcgrad, {"max_norm": 0.5}),
  ],
)
def test_inject_hyperparams(factory, options):
  injected = optax.inject_hyperparams(factory)(**options)
  _assert_same(jax.jit(lambda: _updates(injected))(), _updates(factory(**options)), rtol=1e-5)


class _Model(nnx.Module):
  def __init__(self):
    self.a = nnx.Param(PARAMS["a"])
    self.c = nnx.Param(PARAMS["b"]["c"])


@each_transform
def test_nnx_optimizer(make):
  model = _Model()
  optimizer = nnx.Optimizer(model, optax.chain(make(), optax.sgd(0.1)), wrt=nnx.Param)
  retain, forget = (
    jax.tree.unflatten(jax.tree.structure(nnx.state(model, nnx.Param)), jax.tree.leaves(tree))
    for tree in (RETAIN, FORGET)
  )
  optimizer.update(model, retain, forget_grads=forget)
  expected = jax.tree.map(lambda w, u: w - 0.1 * u, PARAMS, _updates(make()))
  _assert_same(nnx.state(model, nnx.Param), expected, rtol=1e-5)


@each_transform
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_16_bits(make, dtype):
  """As in float32, but for the rounding of inputs and outputs; zero gradients give no NaN."""
  params, retain, forget = (_tree(seed, dtype) for seed in range(3))
  wide = [jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (retain, forget, params)]
  found = _updates(make(), retain, forget, params)
  assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(found))
  found = jax.tree.map(lambda x: x.astype(jnp.float32), found)
  # The colinear direction and branches do not change here; the result is rounded once.
  _assert_same(found, _updates(make(), *wide), rtol=4 * float(jnp.finfo(dtype).eps), atol=1e-3)
  zero = jax.tree.map(jnp.zeros_like, retain)
  for pair in ((zero, zero), (retain, zero), (zero, forget)):
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(_updates(make(), *pair, params)))


@each_transform
def test_what_is_no_pair_of_gradients(make):
  transform = make()
  state = transform.init(PARAMS)
  with pytest.raises(UserError, match="takes the gradients of both roles; call update"):
    transform.update(RETAIN, state, PARAMS)
  with pytest.raises(UserError, match="differ in structure or shapes"):
    transform.update(RETAIN, state, PARAMS, forget_grads={"a": FORGET["a"]})
  for dtype in (jnp.int32, jnp.complex64):
    with pytest.raises(UserError, match="give real gradients"):
      transform.update(RETAIN, state, PARAMS, forget_grads=jax.tree.map(lambda x: x.astype(dtype), FORGET))


# --- SAM ---


def _loss(params):
  return sum(jnp.sum(jnp.cosh(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(params))


def _sharp(transform, params=PARAMS):
  gradients = jax.grad(_loss)(params)
  return transform.update(gradients, transform.init(params), params, grad_fn=jax.grad(_loss))[0]


_BASES = {
  "masked": lambda base: optax.masked(base, {"a": True, "b": {"c": False}}),
  "MultiSteps": lambda base: optax.MultiSteps(base, 1),
  "apply_if_finite": lambda base: optax.apply_if_finite(base, 3),
}


@pytest.mark.parametrize("name", _BASES)
def test_sam_inside_and_around_a_wrapper(name):
  wrap, base = _BASES[name], optax.sgd(0.1)
  with pytest.raises(
    ValueError, match=rf"sam inside optax.{name}.*: sam\(optax.{name}\(optimizer, ...\), rho=...\)"
  ):
    _sharp(wrap(sam_jax.sam(base, rho=0.1)))
  gradients = sam_jax.sharpness_aware(jax.grad(_loss), rho=0.1)(PARAMS)
  wrapped = wrap(base)
  expected = wrapped.update(gradients, wrapped.init(PARAMS), PARAMS)[0]
  _assert_same(_sharp(sam_jax.sam(wrap(base), rho=0.1)), expected)


def test_sam_inside_a_partition():
  parts = {"x": sam_jax.sam(optax.sgd(0.1), rho=0.1), "y": optax.sgd(0.1)}
  with pytest.raises(ValueError, match="sam inside optax.masked"):
    _sharp(optax.partition(parts, {"a": "x", "b": {"c": "y"}}))


def test_sam_with_injected_radius_and_in_nnx():
  expected = _sharp(sam_jax.sam(optax.sgd(0.1), rho=0.1))
  injected = optax.inject_hyperparams(lambda rho: sam_jax.sam(optax.sgd(0.1), rho=rho))(rho=0.1)
  _assert_same(jax.jit(lambda: _sharp(injected))(), expected)
  model = _Model()
  optimizer = nnx.Optimizer(model, sam_jax.sam(optax.sgd(0.1), rho=0.1), wrt=nnx.Param)
  gradients = jax.grad(_loss)(nnx.state(model, nnx.Param))
  optimizer.update(model, gradients, grad_fn=jax.grad(_loss))
  _assert_same(nnx.state(model, nnx.Param), optax.apply_updates(PARAMS, expected), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("size", [0, 1e-5, 1, 1e4])
def test_perturbation_in_every_dtype(dtype, adaptive, size):
  """The norm of e, or of e / |w|, is rho for every gradient but zero, whose e is zero."""
  params = _tree(0, dtype)
  gradients = jax.tree.map(lambda x: (size * x.astype(jnp.float32)).astype(dtype), _tree(1))
  moved = sam_jax.perturbation(params, gradients, rho=0.1, adaptive=adaptive)
  assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(moved))
  wide = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(moved)]
  if adaptive:
    wide = [
      e / np.abs(np.asarray(w, np.float64).ravel())
      for e, w in zip(wide, jax.tree.leaves(params), strict=True)
    ]
  assert np.linalg.norm(np.concatenate(wide)) == pytest.approx(0.1 if size else 0, rel=0.03)
