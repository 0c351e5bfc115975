"""The step body against trajectories of the reference implementation and against its own promises."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hamu_jax.config import default as config_lib
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import methods, sub_step
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.objectives import Outputs
from hamu_jax.engine.train_state import create_state
from hamu_jax.paired import Paired
from hamu_jax.transforms.stop import Stop

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "hamu"
TRAJECTORIES = json.loads((GOLDEN / "trajectories.json").read_text())
SHAPES = {"fc1.weight": (16, 8), "fc1.bias": (16,), "fc2.weight": (4, 16), "fc2.bias": (4,)}
SHARES = {"equal": "equal", "gradnorm": "grad_norm", "softmaxdp": "exp_neg_dot"}


def forward(variables, batch, key, train):
  """The golden MLP."""
  del key, train
  p = variables["params"]
  hidden = jnp.tanh(batch["image"] @ p["fc1.weight"].T + p["fc1.bias"][None])
  logits = hidden @ p["fc2.weight"].T + p["fc2.bias"][None]
  return Outputs(logits), variables["batch_stats"]


def fetch(data, indices, key):
  del key
  images, labels = data
  safe = jnp.maximum(indices, 0)
  return {
    "image": images[safe],
    "label": labels[safe],
    "mask": indices >= 0,
    "index": indices,
    "forget": indices >= len(labels) // 2,
  }


def unflatten(flat):
  params, start = {}, 0
  for name, shape in SHAPES.items():
    size = int(np.prod(shape))
    params[name] = jnp.asarray(flat[start : start + size].reshape(shape))
    start += size
  return params


def flatten(params):
  return np.concatenate([np.asarray(params[name]).ravel() for name in SHAPES])


@pytest.fixture(scope="module")
def arrays():
  with np.load(GOLDEN / "trajectories.npz", allow_pickle=False) as archive:
    return dict(archive)


def options_of(name, **overrides):
  options = config_lib.default_config().method
  options.name = name
  with options.unlocked():
    for key, value in overrides.items():
      options[key] = value
  return options


def golden_options(case):
  options = options_of(case["method"], on_infeasible="exceed", reference_sign=True)
  options.optimizer.name = case["base"]
  options.optimizer.learning_rate = case["lr"]
  options.clip_norm = case["max_grad_norm"]
  if case["method"].startswith("hamu"):
    options.constraint_ratio = case["ratio"]
    options.share = SHARES[case["distribution"]]
    options.normalize_share = case["normalize"]
    if not case["use_lr_radius"]:
      options.radius, options.constraint = case["radius"], case["constraint"]
    options.stop_on_criterion = case["stop_on_stopping_criterion"]
    if case["stop_on_failed_feasibility"]:
      options.on_infeasible = "stop"
  if case["method"] == "scrub":
    options.alpha, options.gamma = case["alpha"], case["gamma"]
  return options


def golden_data(arrays):
  images = jnp.concatenate([jnp.asarray(arrays[f"data/{role}_x"]) for role in Paired._fields])
  labels = jnp.concatenate([jnp.asarray(arrays[f"data/{role}_y"]) for role in Paired._fields])
  return images, labels.astype(jnp.int32)


def golden_indices(arrays, name, steps):
  """The indices of each step; those of forget examples follow those of retain examples."""
  indices = []
  for role, offset in (("retain", 0), ("forget", len(arrays["data/retain_y"]))):
    stored = arrays.get(f"{name}/{role}_idx")
    if stored is None:
      indices.append(None)
      continue
    stored = stored[:steps].astype(np.int32)
    indices.append(np.where(stored < 0, -1, stored + offset))
  return Paired(*indices)


def batches(indices):
  indices = jax.tree.map(
    lambda leaf: np.pad(leaf, ((0, chunk_lib.CHUNK_CAPACITY - len(leaf)), (0, 0)), constant_values=-1),
    indices,
  )
  return step_lib.Batches(indices, jnp.zeros(chunk_lib.CHUNK_CAPACITY, jnp.int32))


_CHUNKS = {}
STEPPING = [name for name, row in methods.METHODS.items() if row.substeps and not row.for_language]


def run(options, params, data, indices, *, schedule=optax.constant_schedule(1.0), counts=None):
  """Runs batches as one chunk.

  Returns initial state and, for each of `counts` (default: all examples), (state, metrics, steps run).
  """
  hyperparameters = hyperparameters_of(options, methods.METHODS[options.name])
  static = {name: value for name, value in options.to_dict().items() if name not in hyperparameters}
  static |= {name: value is None for name, value in hyperparameters.items()}
  static["optimizer"] = options.optimizer.to_dict() | {"learning_rate": None}
  # What differs only in data shares a compilation.
  key = json.dumps([static, jax.config.jax_enable_x64, id(schedule)], default=str)
  if key not in _CHUNKS:
    program = step_lib.make_step(
      methods.METHODS[options.name],
      options,
      forward=forward,
      fetch=fetch,
      pairing="sequential",
      train=False,
      schedule=schedule,
      mask_scope="update" if methods.METHODS[options.name].needs_mask else None,
    )
    _CHUNKS[key] = program, jax.jit(chunk_lib.make_chunk(program.step)), schedule
  program, chunk, _ = _CHUNKS[key]
  state = create_state({"params": params}, program.optimizers(hyperparameters), seed=0)
  (length,) = {len(leaf) for leaf in jax.tree.leaves(indices)}
  mask = jax.tree.map(lambda leaf: (jnp.arange(leaf.size) % 2).reshape(leaf.shape), params)
  frozen = sub_step.Frozen(state.variables, mask)
  return state, [
    chunk(state, frozen, data, batches(indices), jnp.int32(count), hyperparameters)
    for count in (counts or [length])
  ]


@pytest.mark.parametrize("case", TRAJECTORIES, ids=lambda case: case["name"])
def test_reproduces_the_reference_trajectory(x64, arrays, case):
  name = case["name"]
  wanted = dict(zip(case["param_rows"], arrays[f"{name}/params"], strict=True))
  steps = [step for step in sorted(wanted) if step]
  _, results = run(
    golden_options(case),
    unflatten(arrays["data/init_params"]),
    golden_data(arrays),
    golden_indices(arrays, name, max(steps)),
    counts=steps,
  )
  for step, (final, metrics, done) in zip(steps, results, strict=True):
    np.testing.assert_allclose(flatten(final.params), wanted[step], rtol=0, atol=1e-6)
    assert int(done) == step
  if case["stop_reason"] is None:
    assert int(final.stop) == Stop.NONE
    assert int(final.step) == max(steps)
  else:
    reasons = {"stopping_criterion": Stop.CRITERION, "failed_feasibility": Stop.INFEASIBLE}
    assert int(final.stop) == reasons[case["stop_reason"]]
    assert int(final.step) == case["stop_step"]
  for role in Paired._fields:
    if f"{name}/{role}_loss" in arrays:
      np.testing.assert_allclose(metrics[f"{role}_loss"][:done], arrays[f"{name}/{role}_loss"], rtol=1e-6)


def simple_problem(seed=0):
  rng = np.random.default_rng(seed)
  data = jnp.asarray(rng.normal(size=(40, 8)), jnp.float32), jnp.asarray(rng.integers(0, 4, 40))
  params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
  indices = Paired(
    np.arange(20, dtype=np.int32).reshape(2, 10), np.arange(20, 40, dtype=np.int32).reshape(2, 10)
  )
  return data, params, indices


def assert_nothing_changed(before, after, stop):
  """Everything but the stop code is the old state, bit for bit."""
  for old, new in zip(
    jax.tree.leaves(before.replace(stop=0)), jax.tree.leaves(after.replace(stop=0)), strict=True
  ):
    np.testing.assert_array_equal(old, new)
  assert int(after.stop) == stop


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", STEPPING)
def test_a_step_that_is_not_finite_changes_nothing(name, optimizer):
  data, params, indices = simple_problem()
  options = options_of(name, on_infeasible="project", constraint_ratio=0.01)
  options.optimizer.name = optimizer
  used = Paired(
    *(
      role_indices if role in methods.METHODS[name].roles else None
      for role, role_indices in indices._asdict().items()
    )
  )
  # The second step reads a broken image.
  broken = data[0].at[np.r_[15, 35]].set(jnp.nan), data[1]
  before, ((first, _, _), (last, metrics, done)) = run(options, params, broken, used, counts=[1, 2])
  assert int(first.step) == 1
  assert not np.array_equal(flatten(first.params), flatten(before.params))
  assert_nothing_changed(first, last, Stop.NONFINITE)
  assert int(done) == 2
  assert list(metrics["stop"][:2]) == [Stop.NONE, Stop.NONFINITE]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_infeasible_step_changes_nothing(optimizer):
  data, params, indices = simple_problem()
  options = options_of("hamu-q", constraint_ratio=1.0)
  options.optimizer.name = optimizer
  before, ((after, metrics, done),) = run(options, params, data, indices)
  assert_nothing_changed(before, after, Stop.INFEASIBLE)
  assert int(done) == 1
  assert 0 < float(metrics["feasible_ratio"][0]) < 1


@pytest.mark.parametrize(
  ("threshold", "stop"),
  [({"max_retain_loss": 1e-3}, Stop.RETAIN_LOSS), ({"min_forget_loss": 1e3}, Stop.FORGET_LOSS)],
)
def test_a_crossed_loss_threshold_changes_nothing(threshold, stop):
  data, params, indices = simple_problem()
  loose = {"max_retain_loss": 1e3, "min_forget_loss": 0.0}
  options = options_of("gdiff", stop_on_loss=True, **(loose | threshold))
  before, ((after, _, _),) = run(options, params, data, indices)
  assert_nothing_changed(before, after, stop)


def test_a_schedule_acts_and_a_ratio_follows_it():
  data, params, indices = simple_problem()
  options = options_of("hamu-q", on_infeasible="project", constraint_ratio=0.1)
  options.optimizer.learning_rate = 0.5

  def halving(count):
    return 0.5**count

  _, ((_, metrics, _),) = run(options, params, data, indices, schedule=halving)
  np.testing.assert_allclose(metrics["learning_rate"][:2], [0.5, 0.25])
  np.testing.assert_allclose(metrics["constraint"][:2].sum(axis=1), [0.05, 0.025], rtol=1e-5)


def test_clipping_is_by_the_whole_norm():
  gradient = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([4.0])}
  clipped = sub_step.clip(gradient, jnp.asarray(5.0), 1.0)
  np.testing.assert_allclose(clipped["a"], [0.6, 0], rtol=1e-6)
  np.testing.assert_allclose(clipped["b"], [0.8], rtol=1e-6)
  for untouched in (
    sub_step.clip(gradient, jnp.asarray(5.0), 9.0),
    sub_step.clip(gradient, jnp.asarray(5.0), None),
  ):
    np.testing.assert_array_equal(untouched["a"], gradient["a"])
