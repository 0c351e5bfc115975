"""Per-example terms against closed forms, and role gradients against the mean's own gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from hamu_jax.engine import objectives
from hamu_jax.engine import role_gradient as role_gradient_lib
from hamu_jax.engine.objectives import Outputs


def linear(variables, batch, key, train):
  del key, train
  return Outputs(batch["image"] @ variables["params"]), variables["batch_stats"]


def context(batch, reference_logits=None, params=(), **hyperparameters):
  reference = Outputs(reference_logits)
  return objectives.Context(batch, reference, params, jax.random.key(0), hyperparameters)


def inputs(data, reference=None):
  return role_gradient_lib.Inputs({}, reference, data, jax.random.key(0), jax.random.key(0), {})


def fetch(data, indices, key):
  del key
  images, labels = data
  safe = jnp.maximum(indices, 0)
  return {"image": images[safe], "label": labels[safe], "mask": indices >= 0, "index": indices}


@pytest.fixture
def problem(x64):
  rng = np.random.default_rng(0)
  data = jnp.asarray(rng.normal(size=(30, 4))), jnp.asarray(rng.integers(0, 3, 30))
  variables = {"params": jnp.asarray(rng.normal(size=(4, 3))), "batch_stats": {}}
  reference = {"params": jnp.asarray(rng.normal(size=(4, 3))), "batch_stats": {}}
  return data, variables, reference


def test_cross_entropy_is_the_negative_log_probability(problem):
  (images, labels), variables, _ = problem
  logits = np.asarray(images @ variables["params"])
  wanted = -np.log(scipy.special.softmax(logits, axis=1))[np.arange(30), labels]
  got = objectives.cross_entropy(Outputs(jnp.asarray(logits)), context({"label": labels}))
  np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_kl_is_the_relative_entropy_from_the_original(problem):
  (images, labels), variables, reference = problem
  p0 = scipy.special.softmax(np.asarray(images @ reference["params"]), axis=1)
  p = scipy.special.softmax(np.asarray(images @ variables["params"]), axis=1)
  got = objectives.kl_to_reference(
    Outputs(images @ variables["params"]), context({}, images @ reference["params"])
  )
  np.testing.assert_allclose(got, scipy.special.rel_entr(p0, p).sum(axis=1), rtol=1e-9)


def test_distillation_is_the_relative_entropy_at_a_temperature(problem):
  (images, _), variables, reference = problem
  p0 = scipy.special.softmax(np.asarray(images @ reference["params"]) / 4, axis=1)
  p = scipy.special.softmax(np.asarray(images @ variables["params"]) / 4, axis=1)
  got = objectives.distillation(
    Outputs(images @ variables["params"]),
    context({}, images @ reference["params"], temperature=4.0),
  )
  np.testing.assert_allclose(got, 16 * scipy.special.rel_entr(p0, p).sum(axis=1), rtol=1e-9)


def test_the_mean_of_the_l1_term_is_the_norm_and_its_gradient_the_sign(x64):
  params = {"w": jnp.asarray([[1.0, -2.0]]), "b": jnp.asarray([-0.5])}
  batch = {"label": jnp.zeros(3, int)}

  def mean(params):
    return objectives.l1_norm(Outputs(jnp.zeros((3, 2))), context(batch, params=params)).mean()

  assert float(mean(params)) == 3.5
  gradient = jax.grad(mean)(params)
  np.testing.assert_array_equal(gradient["w"], [[1, -1]])
  np.testing.assert_array_equal(gradient["b"], [-1])


def test_only_the_l1_term_waits_for_the_perturbed_point():
  coefficients = {name: jnp.asarray(2.0) for name in objectives.TERMS}
  clean = objectives.clean_coefficients(coefficients)
  assert {name for name in clean if float(clean[name]) == 0} == {"l1"}


def test_kl_of_a_model_to_itself_is_zero_and_never_negative():
  logits = jnp.asarray(np.random.default_rng(1).normal(size=(500, 10)) * 5, jnp.float32)
  values = objectives.kl_to_reference(Outputs(logits), context({}, logits + 1e-6))
  assert (np.asarray(values) >= 0).all()
  np.testing.assert_allclose(values, 0, atol=1e-5)


@pytest.mark.parametrize("microbatch", [0, 4, 7, 30])
@pytest.mark.parametrize("terms", [("ce",), ("kl",), ("ce", "kl")])
def test_gradient_is_that_of_the_sum_over_valid_rows(problem, microbatch, terms):
  data, variables, reference = problem
  coefficients = {"ce": jnp.asarray(0.7), "kl": jnp.asarray(-1.3)}
  valid = np.array([3, 1, 4, 15, 9, 26, 5, 8, 7, 11])
  indices = jnp.asarray(np.concatenate([valid[:6], [-1, -1], valid[6:], [-1]]).astype(np.int32))

  def objective(params):
    images, labels = data[0][valid], data[1][valid]
    log_p = jax.nn.log_softmax(images @ params)
    log_p0 = jax.nn.log_softmax(images @ reference["params"])
    parts = {
      "ce": -log_p[jnp.arange(10), labels],
      "kl": jnp.sum(jnp.exp(log_p0) * (log_p0 - log_p), axis=1),
    }
    return sum(coefficients[name] * parts[name].sum() for name in terms)

  role = role_gradient_lib.role_gradient(linear, fetch, terms, train=False, microbatch=microbatch)
  sums = role(variables, inputs(data, reference), indices, {name: coefficients[name] for name in terms})
  np.testing.assert_allclose(sums.gradient, jax.grad(objective)(variables["params"]), rtol=1e-10)
  assert sums.count == 10
  correct = np.argmax(data[0][valid] @ variables["params"], axis=1) == data[1][valid]
  assert sums.values["accuracy"] == (correct.sum(), 10)


def test_no_unused_term_is_computed(problem):
  data, variables, _ = problem
  role = role_gradient_lib.role_gradient(linear, fetch, ("ce",), train=False)
  indices = jnp.arange(5, dtype=jnp.int32)
  # A reference that does not exist could not be evaluated.
  sums = role(variables, inputs(data), indices, {"ce": jnp.asarray(1.0)})
  assert set(sums.values) == {"ce", "accuracy"}


def test_microbatches_and_batch_statistics_exclude_each_other(problem):
  data, variables, _ = problem
  role = role_gradient_lib.role_gradient(linear, fetch, ("ce",), train=True, microbatch=4)
  variables = variables | {"batch_stats": {"mean": jnp.zeros(3)}}
  with pytest.raises(ValueError, match="microbatch=4"):
    role(variables, inputs(data), jnp.arange(8, dtype=jnp.int32), {"ce": jnp.asarray(1.0)})
