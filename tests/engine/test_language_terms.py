"""Terms over predictions and examples of packed examples, against closed forms in NumPy, and their means.

Shapes: B examples, P predictions of an example, S slots, V classes, D hidden states, F inputs.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from hamu_jax.config import default as config_lib
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import methods, objectives, pairing, placement, sub_step
from hamu_jax.engine import role_gradient as role_gradient_lib
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.objectives import Outputs
from hamu_jax.engine.train_state import create_state
from hamu_jax.paired import Paired

SIZES = {"predictions": 14, "slots": 4, "classes": 7, "hidden": 6, "inputs": 5}
# None of them is what a method takes by itself.
SETTINGS = {"preference_beta": 0.7, "margin": 0.3, "steering": 1.7}
DEFAULT_BETA = {"npo": 0.1, "simnpo": 4.5, "dpo": 0.1, "undial": 10.0, "weighted_ce": 1.0}
OVER = {
  "npo": "example_mask",
  "simnpo": "example_mask",
  "dpo": "example_mask",
  "alternative": "alternative_mask",
}
# What each role of a method descends, of term and coefficient; NAME_kl has "kl" in place of "ce".
FORGET = {
  "npo": {"npo": 1.5},
  "simnpo": {"simnpo": 1.5},
  "dpo": {"dpo": 1.5},
  "idk": {"alternative": 1.5},
  "undial": {"undial": 1.5},
  "wga": {"weighted_ce": -1.5},
}
METHODS = {
  **{name: ({"ce": 0.6}, forget) for name, forget in FORGET.items()},
  **{f"{name}_kl": ({"kl": 0.6}, forget) for name, forget in FORGET.items()},
  "rmu": ({"hidden": 0.6}, {"misdirection": 1.5}),
}


def packed_rows(*texts, rng):
  """Examples of [(own predictions, alternative predictions) of each example], padded behind."""
  predictions, slots = SIZES["predictions"], SIZES["slots"]
  indices = len(texts)
  batch = {
    "label": np.zeros((indices, predictions), np.int32),
    "slot": np.zeros((indices, predictions), np.int32),
    "mask": np.zeros((indices, predictions), bool),
    "alternative_mask": np.zeros((indices, predictions), bool),
    "example_mask": np.zeros((indices, slots), bool),
    # Also where padded: no value there may count.
    "x": rng.normal(size=(indices, predictions, SIZES["inputs"])),
  }
  for index, examples in enumerate(texts):
    place = 0
    for slot, counts in enumerate(examples):
      batch["example_mask"][index, slot] = True
      for name, count in zip(("mask", "alternative_mask"), counts, strict=True):
        own = np.s_[index, place : place + count]
        batch[name][own] = True
        batch["slot"][own] = slot
        batch["label"][own] = rng.integers(SIZES["classes"], size=count)
        place += count
  return batch


@pytest.fixture
def batch():
  """Several examples a row with their alternatives, a row of padding, and one without alternatives."""
  return packed_rows([(3, 2), (2, 3), (1, 1)], [(1, 4)], [], [(2, 0), (4, 0)], rng=np.random.default_rng(0))


@pytest.fixture
def outputs(x64, batch):
  """Of the model and of the original one; in float64."""
  rng = np.random.default_rng(1)
  shape = batch["label"].shape

  def one():
    return Outputs(
      jnp.asarray(2 * rng.normal(size=(*shape, SIZES["classes"]))),
      jnp.asarray(rng.normal(size=(*shape, SIZES["hidden"]))),
    )

  return one(), one()


def direction(size, dtype=np.float64):
  """RMU's: uniform in [0, 1), of norm one, the same for all runs of a size."""
  drawn = np.asarray(jax.random.uniform(jax.random.key(0), (size,), dtype))
  return drawn / np.linalg.norm(drawn)


def closed_form(name, batch, outputs, reference, hyperparameters):
  """-> values, and by the index of each value the gradients by the logits [B, P, V] and states [B, P, D].

  Args:
    name: of the term.
    batch: as of `packed_rows`.
    outputs: (logits, hidden) in NumPy.
    reference: those of the original model.
    hyperparameters: "preference_beta" may be None.
  """
  (logits, hidden), (logits0, hidden0) = outputs, reference
  log_p, log_p0 = (scipy.special.log_softmax(part, axis=-1) for part in (logits, logits0))
  p, p0 = np.exp(log_p), np.exp(log_p0)
  label = np.eye(logits.shape[-1])[batch["label"]]
  picked, picked0 = np.sum(label * log_p, axis=-1), np.sum(label * log_p0, axis=-1)
  beta = hyperparameters["preference_beta"] or DEFAULT_BETA.get(name)
  indices, predictions = picked.shape

  if OVER.get(name) == "example_mask":
    values, slopes = np.zeros(batch["example_mask"].shape), {}
    for index, slot in np.ndindex(values.shape):
      own, other = (
        batch[mask][index] & (batch["slot"][index] == slot) for mask in ("mask", "alternative_mask")
      )
      lose, win = ((picked - picked0)[index, which].sum() for which in (own, other))
      slope = np.zeros(logits.shape)
      toward = label[index] - p[index]  # The gradient of log p by the logits.
      if name == "npo":
        values[index, slot] = -2 / beta * np.log(scipy.special.expit(-beta * lose))
        slope[index, own] = 2 * scipy.special.expit(beta * lose) * toward[own]
      elif name == "simnpo":
        length = max(own.sum(), 1)
        rise = -picked[index, own].sum() / length - hyperparameters["margin"]
        values[index, slot] = -2 / beta * np.log(scipy.special.expit(beta * rise))
        slope[index, own] = 2 * scipy.special.expit(-beta * rise) / length * toward[own]
      else:
        values[index, slot] = -2 / beta * np.log(scipy.special.expit(beta * (win - lose)))
        share = 2 * scipy.special.expit(-beta * (win - lose))
        slope[index, own], slope[index, other] = share * toward[own], -share * toward[other]
      slopes[index, slot] = slope, np.zeros(hidden.shape)
    return values, slopes

  target = hyperparameters["steering"] * direction(hidden.shape[-1])
  lowered = scipy.special.softmax(logits0 - (beta or 0) * label, axis=-1)
  nothing, still = np.zeros(logits.shape), np.zeros(hidden.shape)
  values, logit_slope, hidden_slope = {
    "ce": lambda: (-picked, p - label, still),
    "alternative": lambda: (-picked, p - label, still),
    "kl": lambda: (scipy.special.rel_entr(p0, p).sum(-1), p - p0, still),
    "undial": lambda: (-np.sum(lowered * log_p, axis=-1), p - lowered, still),
    "weighted_ce": lambda: (
      -np.exp(beta * picked) * picked,
      np.exp(beta * picked)[..., None] * (p - label),
      still,
    ),
    "misdirection": lambda: (
      np.mean((hidden - target) ** 2, axis=-1),
      nothing,
      2 * (hidden - target) / hidden.shape[-1],
    ),
    "hidden": lambda: (
      np.mean((hidden - hidden0) ** 2, axis=-1),
      nothing,
      2 * (hidden - hidden0) / hidden.shape[-1],
    ),
  }[name]()
  slopes = {}
  for index, at in itertools.product(range(indices), range(predictions)):
    where = np.zeros((indices, predictions, 1))
    where[index, at] = 1
    slopes[index, at] = where * logit_slope, where * hidden_slope
  return values, slopes


TERMS = (
  "ce",
  "kl",
  "alternative",
  "npo",
  "simnpo",
  "dpo",
  "misdirection",
  "hidden",
  "undial",
  "weighted_ce",
)


def context(batch, reference, **hyperparameters):
  batch = {name: jnp.asarray(values) for name, values in batch.items()}
  return objectives.Context(batch, reference, {}, jax.random.key(0), SETTINGS | hyperparameters)


@pytest.mark.parametrize("beta", [0.7, None])
@pytest.mark.parametrize("name", TERMS)
def test_values_and_gradients(batch, outputs, name, beta):
  current, reference = outputs
  term = objectives.TERMS[name]
  assert term.over == OVER.get(name, "mask")
  hyperparameters = SETTINGS | {"preference_beta": beta}
  wanted, slopes = closed_form(
    name, batch, jax.device_get(current), jax.device_get(reference), hyperparameters
  )
  # Only what a term says that it needs.
  given = current if term.needs_hidden else current._replace(hidden=None)
  needed = reference if term.needs_reference else None
  rng = np.random.default_rng(2)
  weights = rng.normal(size=wanted.shape) * batch[term.over]

  def total(given):
    values = term.values(given, context(batch, needed, **hyperparameters))
    assert values.shape == batch[term.over].shape
    return jnp.sum(jnp.asarray(weights) * values), values

  gradient, values = jax.jit(jax.grad(total, has_aux=True))(given)
  valid = batch[term.over]
  assert values.dtype == np.float64
  np.testing.assert_allclose(np.asarray(values)[valid], wanted[valid], rtol=1e-10, atol=1e-12)
  assert np.isfinite(values).all()
  for part, field in enumerate(("logits", "hidden")):
    if getattr(given, field) is not None:
      total_slope = sum(weights[at] * slope[part] for at, slope in slopes.items())
      np.testing.assert_allclose(getattr(gradient, field), total_slope, rtol=1e-9, atol=1e-12)


def test_npo_starts_as_gradient_ascent(batch, outputs):
  """Where the model is the original, the value is 2 log 2 / b and the gradient that of log p."""
  current, _ = outputs

  def total(term, logits):
    values = term(Outputs(logits), context(batch, Outputs(current.logits), preference_beta=None))
    return values

  values = total(objectives.npo, current.logits)
  np.testing.assert_allclose(values, np.full(values.shape, 2 * np.log(2) / 0.1), rtol=1e-12)
  got = jax.grad(lambda logits: total(objectives.npo, logits).sum())(current.logits)

  def summed_log_p(logits):
    return -jnp.sum(jnp.where(batch["mask"], total(objectives.cross_entropy, logits), 0))

  np.testing.assert_allclose(got, jax.grad(summed_log_p)(current.logits), rtol=1e-10, atol=1e-13)


def test_dpo_moves_from_the_answer_to_its_alternative(batch, outputs):
  current, reference = outputs

  def total(logits):
    return jnp.sum(objectives.dpo(Outputs(logits), context(batch, reference)) * batch["example_mask"])

  def summed(logits, mask):
    log_p = objectives.log_probability(logits, jnp.asarray(batch["label"]))
    return float(jnp.sum(jnp.where(batch[mask], log_p, 0)))

  moved = current.logits - 1e-3 * jax.grad(total)(current.logits)
  assert summed(moved, "alternative_mask") > summed(current.logits, "alternative_mask")
  assert summed(moved, "mask") < summed(current.logits, "mask")


def test_no_gradient_goes_through_the_weight_of_wga(batch, outputs):
  """With it, that of p CE vanishes at p = 1 / e; without it, it never does."""
  logits = jnp.log(jnp.asarray([[[1 / np.e, 1 - 1 / np.e]]]))
  one = {name: values[:1, :1] for name, values in batch.items()} | {"label": np.zeros((1, 1), np.int32)}
  gradient = jax.grad(
    lambda logits: objectives.weighted_cross_entropy(
      Outputs(logits), context(one, None, preference_beta=None)
    ).sum()
  )(logits)
  p = 1 / np.e
  np.testing.assert_allclose(gradient, [[[p * (p - 1), p * (1 - p)]]], rtol=1e-12)


def test_undial_lowers_the_true_token_alone(batch, outputs):
  """At the minimum the model is the original with the true token's odds divided by e^b."""
  _, reference = outputs
  label = np.eye(SIZES["classes"])[batch["label"]]
  best = Outputs(jnp.asarray(np.asarray(reference.logits) - 3 * label))
  gradient = jax.grad(
    lambda logits: objectives.undial(Outputs(logits), context(batch, reference, preference_beta=3.0)).sum()
  )(best.logits)
  np.testing.assert_allclose(gradient, np.zeros(gradient.shape), atol=1e-12)


def test_rmu_steers_to_a_vector_of_one_length_and_direction(batch, outputs):
  current, _ = outputs
  size = SIZES["hidden"]
  at_target = Outputs(None, jnp.broadcast_to(1.7 * jnp.asarray(direction(size)), current.hidden.shape))
  np.testing.assert_allclose(objectives.misdirection(at_target, context(batch, None)), 0, atol=1e-20)
  # Not a step's own: neither its key nor its epoch changes it.
  other = context(batch, None)._replace(epoch_key=jax.random.key(9))
  np.testing.assert_array_equal(
    objectives.misdirection(current, other), objectives.misdirection(current, context(batch, None))
  )


@pytest.mark.parametrize("name", ["misdirection", "hidden"])
def test_states_in_sixteen_bits_are_compared_in_more(batch, outputs, name):
  # Large beside their distance.
  half, reference = (each._replace(hidden=(8 + each.hidden).astype(jnp.bfloat16)) for each in outputs)
  whole, whole_reference = (
    each._replace(hidden=each.hidden.astype(jnp.float32)) for each in (half, reference)
  )
  term = objectives.TERMS[name].values
  values = term(half, context(batch, reference))
  assert values.dtype == jnp.float32
  np.testing.assert_array_equal(values, term(whole, context(batch, whole_reference)))


def linear(variables, batch, key, train):
  """Two linear layers: logits and states of the inputs."""
  del key, train
  params = variables["params"]
  return Outputs(batch["x"] @ params["w"], batch["x"] @ params["v"]), variables["batch_stats"]


def fetch(data, index_B, key):
  del key
  batch = {name: values[index_B.clip(0)] for name, values in data.items()}
  for name in ("mask", "alternative_mask", "example_mask"):
    batch[name] = batch[name] & (index_B >= 0)[:, None]
  return batch


@pytest.fixture
def problem(x64):
  """(data of 6 retain and 6 forget examples, variables, reference)."""
  rng = np.random.default_rng(3)
  counts = [[(int(n), 0) for n in rng.integers(1, 4, size)] for size in (1, 4, 2, 3, 1, 2)]
  counts += [[(int(n), int(m)) for n, m in rng.integers(1, 3, (size, 2))] for size in (3, 1, 2, 1, 3, 2)]
  data = packed_rows(*counts, rng=rng)

  def variables():
    shapes = {"w": ("inputs", "classes"), "v": ("inputs", "hidden")}
    params = {name: rng.normal(size=[SIZES[axis] for axis in axes]) / 2 for name, axes in shapes.items()}
    return {"params": params, "batch_stats": {}}

  return data, variables(), variables()


ROWS = Paired(np.array([3, 0, -1, 1, 5], np.int32), np.array([7, -1, 6, 11, 10], np.int32))


def summed(problem, indices, coefficients):
  """-> the gradient of a role's sum in closed form, its count, and each term's (sum, count)."""
  data, variables, reference = problem
  batch = {name: values[indices[indices >= 0]] for name, values in data.items()}

  def outputs(params):
    return batch["x"] @ params["w"], batch["x"] @ params["v"]

  gradient = {name: np.zeros(leaf.shape) for name, leaf in variables["params"].items()}
  values, counts = {}, {}
  for name, coefficient in coefficients.items():
    valid = batch[OVER.get(name, "mask")]
    each, slopes = closed_form(
      name, batch, outputs(variables["params"]), outputs(reference["params"]), SETTINGS
    )
    values[name], counts[name] = each[valid].sum(), int(valid.sum())
    for at in zip(*np.nonzero(valid), strict=True):
      for leaf, slope in zip(("w", "v"), slopes[at], strict=True):
        gradient[leaf] += coefficient * np.einsum("bpf,bpo->fo", batch["x"], slope)
  (count,) = set(counts.values())
  return gradient, count, values


def step_inputs(problem):
  data, _, reference = problem
  data = {name: jnp.asarray(values) for name, values in data.items()}
  key = jax.random.key(0)
  return role_gradient_lib.Inputs({}, reference, data, key, key, SETTINGS)


@pytest.mark.parametrize("microbatch", [0, 1, 2])
@pytest.mark.parametrize("name", TERMS)
def test_a_role_sums_over_what_its_term_says(problem, name, microbatch):
  _, variables, _ = problem
  role = role_gradient_lib.role_gradient(linear, fetch, (name,), train=True, microbatch=microbatch)
  sums = jax.jit(role)(variables, step_inputs(problem), jnp.asarray(ROWS.forget), {name: jnp.asarray(-0.8)})
  gradient, count, values = summed(problem, ROWS.forget, {name: -0.8})
  # Examples 6, 7, 10 and 11 have 3, 1, 3 and 2 examples.
  assert sums.count == count and (OVER.get(name) != "example_mask" or count == 9)
  for leaf, wanted in gradient.items():
    np.testing.assert_allclose(sums.gradient[leaf], wanted, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(sums.values[name].total, values[name], rtol=1e-10)
  assert sums.values[name].count == count
  # Whatever is differentiated, the loss and the accuracy of the answers are logged.
  _, predictions, cross_entropies = summed(problem, ROWS.forget, {"ce": 1.0})
  np.testing.assert_allclose(sums.values["ce"].total, cross_entropies["ce"], rtol=1e-10)
  assert sums.values["ce"].count == sums.values["accuracy"].count == predictions


@pytest.mark.parametrize(
  "name",
  [
    name if name in ("npo", "idk", "dpo_kl", "rmu") else pytest.param(name, marks=pytest.mark.slow)
    for name in METHODS
  ],
)
def test_one_step_of_each_method_whatever_the_pairing(problem, name):
  data, variables, reference = problem
  retain, forget = METHODS[name]
  options = config_lib.default_config().method
  options.update(name=name, clip_norm=0.0, retain_coefficient=0.6, forget_coefficient=1.5, **SETTINGS)
  options.optimizer.learning_rate = 0.3
  method = methods.METHODS[name]
  wanted, losses = {**variables["params"]}, {}
  for role, coefficients in (("retain", retain), ("forget", forget)):
    gradient, count, values = summed(problem, getattr(ROWS, role), coefficients)
    wanted = {leaf: wanted[leaf] - 0.3 * gradient[leaf] / count for leaf in wanted}
    for term, total in values.items():
      losses[f"{role}_{'loss' if term == 'ce' else term}"] = total / count

  for kind, devices in (("sequential", 1), ("vmap", 1), ("pmap", 4)):
    mesh = pairing.make_mesh(jax.devices()[:devices], 2) if kind == "pmap" else None
    program = step_lib.make_step(
      method,
      options,
      forward=linear,
      fetch=fetch,
      pairing=kind,
      train=True,
      schedule=optax.constant_schedule(1.0),
      microbatch=1,
    )
    hyperparameters = hyperparameters_of(options, method)
    chunk = chunk_lib.compile_target(chunk_lib.make_chunk(program.step), mesh, method.roles)
    state = create_state(variables, program.optimizers(hyperparameters), seed=0)
    state, frozen, window = placement.place((state, sub_step.Frozen(reference), data), mesh)
    indices = Paired(*(role[None] for role in ROWS))
    batches = placement.place_batches(
      pairing.shard_indices(indices, mesh) if mesh else indices, np.zeros(1, np.int32), mesh
    )
    state, metrics, done = jax.device_get(
      chunk(state, frozen, window, batches, jnp.int32(1), hyperparameters)
    )
    assert done == 1 and state.stop == 0
    for leaf, value in wanted.items():
      np.testing.assert_allclose(
        state.params[leaf], value, rtol=1e-9, atol=1e-12, err_msg=f"{kind} {devices}"
      )
    for metric, value in losses.items():
      np.testing.assert_allclose(metrics[metric][0], value, rtol=1e-9, err_msg=f"{kind} {metric}")


def test_these_are_all_methods_for_language():
  assert set(METHODS) == {name for name, method in methods.METHODS.items() if method.for_language}
