"""Sharpness-aware minimisation: the paper's trajectories, closed forms and general properties."""

import json
import pathlib
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from sam_jax import perturbation, sam, sharpness_aware
from tests.sam_jax import nets

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "sam"
TRAJECTORIES = json.loads((GOLDEN / "index.json").read_text())["trajectories"]
CLASSES = 4
BATCH = 8


@pytest.fixture(scope="module")
def arrays():
  with np.load(GOLDEN / "sam_trajectories.npz", allow_pickle=False) as archive:
    return dict(archive)


def golden_batches(arrays, net):
  """[images, labels, mask] of each step, all of one size."""
  ends = np.cumsum(arrays[f"{net}/batch_sizes"])[:-1]
  batches = []
  for x, y in zip(np.split(arrays[f"{net}/x"], ends), np.split(arrays[f"{net}/y"], ends)):
    missing = BATCH - len(y)
    x = np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    batches.append([nets.inputs(net, x), np.pad(y, (0, missing)), np.arange(BATCH) < len(y)])
  return batches


def golden_optimizer(case):
  if case["base"] == "adamw":
    return optax.adamw(case["lr"], weight_decay=case["weight_decay"])
  return optax.chain(optax.add_decayed_weights(case["weight_decay"]), optax.sgd(case["lr"], case["momentum"]))


_STEPS = {}


def golden_step(case):
  """(params, batch_stats, opt_state, batch, rho, lamb) -> the first three, losses, gradient norm.

  The losses are at the parameters and, where the case perturbs them, at the perturbed point.
  """
  net, base, _ = case["name"].split("/")
  key = net, base, case["mode"], case["adaptive"]
  if key in _STEPS:
    return _STEPS[key]
  forward = nets.forward(nets.make(net, CLASSES))

  def loss(params, batch_stats, batch):
    image, label, mask = batch
    outputs, batch_stats = forward(
      {"params": params, "batch_stats": batch_stats}, {"image": image, "mask": mask}, None, True
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, label)
    return jnp.sum(losses * mask) / jnp.sum(mask), batch_stats

  @jax.jit
  def step(params, batch_stats, opt_state, batch, rho, lamb):
    (clean_loss, moved_stats), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch_stats, batch)
    optimizer = golden_optimizer(case)
    if case["mode"] is None:
      updates, opt_state = optimizer.update(gradients, opt_state, params)
      return optax.apply_updates(params, updates), moved_stats, opt_state, clean_loss
    optimizer = sam(optimizer, rho=rho, adaptive=case["adaptive"], lamb=lamb, mode=case["mode"])
    updates, opt_state = optimizer.update(
      gradients,
      opt_state,
      params,
      grad_fn=lambda point: jax.grad(loss, has_aux=True)(point, batch_stats, batch)[0],
    )
    e = perturbation(params, gradients, rho=rho, adaptive=case["adaptive"])
    perturbed_loss, _ = loss(optax.apply_updates(params, e), batch_stats, batch)
    # A step e raises the loss by rho times the norm, to first order.
    norm = optax.tree.vdot(e, gradients) / rho
    moved = optax.apply_updates(params, updates)
    return moved, moved_stats, opt_state, clean_loss, perturbed_loss, norm

  _STEPS[key] = step
  return step


@pytest.mark.parametrize("case", TRAJECTORIES, ids=lambda case: case["name"])
def test_reproduces_the_reference_trajectory(x64, arrays, case):
  net = case["name"].split("/")[0]
  step = golden_step(case)
  params = nets.params(net, CLASSES, arrays[f"{net}/init_params"])
  batch_stats = nets.batch_stats(net, arrays[f"{net}/init_buffers"])
  opt_state = golden_optimizer(case).init(params)
  wanted = {
    step: {
      part: values[index]
      for part in ("params", "buffers")
      if (values := arrays.get(f"{case['name']}/{part}")) is not None
    }
    for index, step in enumerate(case["steps"])
  }
  losses, norms = [], []
  for number, batch in enumerate(golden_batches(arrays, net), 1):
    params, batch_stats, opt_state, *found = step(
      params, batch_stats, opt_state, batch, case["rho"], case["lamb"]
    )
    losses.append(found[:2])
    norms.append(found[2:])
    if number in wanted:
      close(nets.flat_params(net, CLASSES, params), wanted[number]["params"])
      if net == "conv":
        jax.tree.map(close, dict(batch_stats), nets.batch_stats(net, wanted[number]["buffers"]))
  close(np.squeeze(losses), arrays[f"{case['name']}/loss"])
  if case["mode"]:
    close(np.squeeze(norms), arrays[f"{case['name']}/grad_norm"])


def close(got, wanted, atol=1e-9):
  np.testing.assert_allclose(got, wanted, rtol=0, atol=atol)


# A loss with a closed form: sum_i (a_i w_i^2 / 2 + b_i w_i), of which the gradient is a w + b.
CURVATURE = {"b": np.array([[3.0, -1.0], [0.5, 2.0]]), "a": np.array([1.0, 4.0, 0.0])}
SLOPE = {"b": np.array([[0.3, -2.0], [1.0, 0.0]]), "a": np.array([-0.7, 0.0, 0.2])}
WEIGHTS = {"b": np.array([[1.0, -0.5], [0.25, 2.0]]), "a": np.array([0.0, -1.5, 1.0])}


def gradient(params):
  return jax.tree.map(lambda a, w, b: jnp.asarray(a) * w + b, CURVATURE, params, SLOPE)


def weights():
  return jax.tree.map(jnp.asarray, WEIGHTS)


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def optimizers():
  return {
    "sgd": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9)),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
  }


def run(optimizer, steps=3):
  """Parameters after some steps of descent from `weights()`."""
  params = weights()
  state = optimizer.init(params)
  for _ in range(steps):
    updates, state = optimizer.update(gradient(params), state, params, grad_fn=gradient)
    params = optax.apply_updates(params, updates)
  return flat(params)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_gradient_is_the_published_formula(x64, mode, adaptive):
  rho, lamb = 0.3, 0.6
  w, a, b = flat(WEIGHTS), flat(CURVATURE), flat(SLOPE)
  g0 = a * w + b
  scale = np.abs(w) if adaptive else 1.0
  e = rho * scale**2 * g0 / np.linalg.norm(scale * g0)
  g1 = a * (w + e) + b
  wanted = g0 + {"min": 1, "max": -1}[mode] * lamb * (g1 - g0)
  got = sharpness_aware(gradient, rho=rho, lamb=lamb, mode=mode, adaptive=adaptive)(weights())
  close(flat(got), wanted, 1e-11)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("off", [{"rho": 0.0}, {"rho": 0.5, "lamb": 0.0}], ids=["rho", "lamb"])
def test_without_radius_or_weight_it_is_the_base_optimizer(off, base, adaptive, mode):
  optimizer = optimizers()[base]
  plain = run(optax.with_extra_args_support(optimizer))
  np.testing.assert_array_equal(run(sam(optimizer, adaptive=adaptive, mode=mode, **off)), plain)
  on = run(sam(optimizer, adaptive=adaptive, mode=mode, rho=0.5))
  assert np.abs(on - plain).max() > 1e-4


@pytest.mark.parametrize("adaptive", [False, True])
def test_modes_are_mirror_images_about_the_clean_gradient(x64, adaptive):
  low, high = (
    flat(sharpness_aware(gradient, rho=0.4, lamb=0.7, adaptive=adaptive, mode=mode)(weights()))
    for mode in ("min", "max")
  )
  assert np.abs(high - low).max() > 1e-2
  close((low + high) / 2, flat(gradient(weights())), 1e-12)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
  seed=st.integers(0, 2**32 - 1),
  exponent=st.integers(-25, 30),
  adaptive=st.booleans(),
  rho=st.sampled_from([1e-3, 0.1, 1.0, 20.0]),
)
def test_perturbation_has_norm_rho(seed, exponent, adaptive, rho):
  rng = np.random.default_rng(seed)
  # NumPy, so that no shape is compiled anew for other numbers.
  params, gradients = (
    [(scale * rng.normal(size=shape)).astype(np.float32) for shape in ((3, 4), (5,))]
    for scale in (1.0, 10.0**exponent)
  )
  e = flat(perturbation(params, gradients, rho=rho, adaptive=adaptive)).astype(float)
  w, g = flat(params).astype(float), flat(gradients).astype(float)
  scale = np.abs(w) if adaptive else 1.0
  norm = np.linalg.norm(scale * g)
  # Below 1e-12 a gradient counts as none.
  np.testing.assert_allclose(np.linalg.norm(e / scale), rho * norm / (norm + 1e-12), rtol=1e-5)
  assert e @ g >= 0


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_zero_gradients_and_zero_weights_give_no_nan(mode, adaptive, base):
  zeros = jax.tree.map(jnp.zeros_like, weights())
  for params, gradients in ((weights(), zeros), (zeros, gradient(weights())), (zeros, zeros)):
    e = perturbation(params, gradients, rho=0.5, adaptive=adaptive)
    if gradients is zeros or (adaptive and params is zeros):
      np.testing.assert_array_equal(flat(e), 0)
    else:
      assert np.linalg.norm(flat(e)) == pytest.approx(0.5)
    optimizer = sam(optimizers()[base], rho=0.5, adaptive=adaptive, mode=mode)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params, grad_fn=lambda point: gradients)
    assert np.isfinite(flat(updates)).all()
    sharp = sharpness_aware(lambda point: gradients, rho=0.5, adaptive=adaptive, mode=mode)
    np.testing.assert_array_equal(flat(sharp(params)), flat(gradients))


@pytest.mark.parametrize("rho", [-0.1, -1, float("nan"), np.float32(-2.0), jnp.float32(-2)])
def test_a_bad_radius_is_refused(rho):
  for build in (partial(sam, optax.sgd(0.1)), partial(sharpness_aware, gradient)):
    with pytest.raises(ValueError, match=r"^rho=.*(-|nan).*at least 0$"):
      build(rho=rho)


def test_an_unknown_mode_is_refused():
  for build in (partial(sam, optax.sgd(0.1)), partial(sharpness_aware, gradient)):
    with pytest.raises(ValueError, match="^mode='flat': choose from min, max$"):
      build(rho=0.1, mode="flat")


def test_a_radius_and_weight_may_be_traced():

  @jax.jit
  def traced(rho, lamb):
    return sharpness_aware(gradient, rho=rho, lamb=lamb)(weights())

  for rho, lamb in ((0.0, 1.0), (0.2, 0.5), (1.0, 1.0)):
    wanted = sharpness_aware(gradient, rho=rho, lamb=lamb)(weights())
    np.testing.assert_allclose(flat(traced(rho, lamb)), flat(wanted), rtol=1e-6)
  assert traced._cache_size() == 1


def test_clipping_before_it_in_a_chain(x64):
  """`optax.chain` hands `grad_fn` on; what perturbs, and is the clean part, is the clipped one."""
  most, rho, lamb, rate = 0.5, 0.3, 0.4, 0.1
  optimizer = optax.chain(optax.clip_by_global_norm(most), sam(optax.sgd(rate), rho=rho, lamb=lamb))
  w, a, b = flat(WEIGHTS), flat(CURVATURE), flat(SLOPE)
  g0 = (a * w + b) * most / np.linalg.norm(a * w + b)
  g1 = a * (w + rho * g0 / np.linalg.norm(g0)) + b
  close(run(optimizer, steps=1), w - rate * (g0 + lamb * (g1 - g0)), 1e-11)


@pytest.mark.parametrize("missing", ["params", "grad_fn"])
def test_update_says_what_it_lacks(missing):
  optimizer = sam(optax.sgd(0.1), rho=0.1)
  given = {"params": weights(), "grad_fn": gradient}
  del given[missing]
  with pytest.raises(ValueError, match=rf"^sam: update needs {missing};.*grad_fn=\.\.\."):
    optimizer.update(gradient(weights()), optimizer.init(weights()), **given)


def test_auxiliary_data_are_those_of_the_clean_point():
  calls = []

  def counted(params):
    calls.append(params)
    return gradient(params), len(calls)

  with_aux, aux = sharpness_aware(counted, rho=0.3, has_aux=True)(weights())
  assert (aux, len(calls)) == (1, 2)
  np.testing.assert_array_equal(flat(calls[0]), flat(weights()))
  wanted = sharpness_aware(gradient, rho=0.3)(weights())
  np.testing.assert_array_equal(flat(with_aux), flat(wanted))


def test_two_objectives_at_one_perturbed_point(x64):
  """`direction` says which gradient perturbs; each objective's is then sharpness-aware."""
  rho, lamb = 0.3, 0.6
  w, a, b = flat(WEIGHTS), flat(CURVATURE), flat(SLOPE)

  def both(params):
    return [gradient(params), jax.tree.map(lambda leaf: 3 * leaf * leaf, params)]

  first, second = sharpness_aware(
    both,
    rho=rho,
    lamb=lamb,
    direction=lambda gradients: jax.tree.map(jnp.subtract, *gradients),
  )(weights())
  led = a * w + b - 3 * w * w
  moved = w + rho * led / np.linalg.norm(led)
  close(flat(first), (1 - lamb) * (a * w + b) + lamb * (a * moved + b), 1e-11)
  close(flat(second), (1 - lamb) * 3 * w * w + lamb * 3 * moved * moved, 1e-11)


def test_an_objective_may_have_a_part_at_the_perturbed_point_only(x64):
  penalty = jax.tree.map(jnp.ones_like, weights())

  def penalised(params):
    return jax.tree.map(jnp.add, gradient(params), penalty)

  plain, more = (
    flat(sharpness_aware(gradient, rho=0.3, lamb=0.6, perturbed_grad_fn=function)(weights()))
    for function in (None, penalised)
  )
  close(more - plain, 0.6, 1e-12)
