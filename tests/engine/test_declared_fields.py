"""Each field that a method declares changes what is computed, and a method declares all that it reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hamu_jax.config import default as config_lib
from hamu_jax.config.fields import FIELDS
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.engine import methods, sub_step
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.objectives import TERMS, Outputs
from hamu_jax.engine.train_state import create_state
from hamu_jax.experiment import stage_plan
from hamu_jax.paired import Paired

STEPS, ROWS, PREDICTIONS, EXAMPLES, INPUTS, HIDDEN, CLASSES = 6, 12, 4, 2, 5, 4, 3

# Another value of each field that the step reads, and what else must be set for it to matter.
OTHERS = {
  "alpha": (0.7, {}),
  "beta": (0.8, {}),
  "gamma": (0.3, {}),
  "temperature": (1.5, {}),
  "msteps": (0, {}),
  "retain_weight": (0.4, {}),
  "retain_mode": ("max", {}),
  "forget_mode": ("min", {}),
  "epochs": (9.0, {}),
  "l1_weight": (0.2, {}),
  "l1_free_epochs": (1.0, {"l1_weight": 0.1}),
  "constraint": (0.01, {}),
  "constraint_ratio": (0.2, {}),
  "radius": (0.03, {}),
  "share": ("equal", {}),
  "scope": ("global", {}),
  "normalize_share": (False, {}),
  "on_infeasible": ("exceed", {"constraint_ratio": 0.9, "share": "equal", "clip_norm": 0.1}),
  "stop_on_criterion": (True, {"constraint_ratio": 5.0}),
  "criterion": ("descent", {}),
  "max_norm": (0.01, {}),
  "reference_sign": (True, {}),
  "retain_coefficient": (0.3, {}),
  "forget_coefficient": (0.3, {}),
  "preference_beta": (0.9, {}),
  "margin": (0.7, {}),
  "steering": (5.0, {}),
}
# Read by the model, see `tests/language/test_task.py`.
READ_BY_THE_MODEL = {"layer"}
DECLARED = [
  (name, field)
  for name, method in methods.METHODS.items()
  for field in sorted(method.reads - READ_BY_THE_MODEL)
]


def fetch(data, indices, key):
  """Rows of packed predictions, of which images are the simplest."""
  del key
  batch = {name: leaf[indices.clip(0)] for name, leaf in data.items()}
  present = indices >= 0
  for name in ("mask", "alternative_mask", "example_mask"):
    batch[name] = batch[name] & present[:, None]
  return batch


def forward(variables, batch, key, train):
  """A network of one hidden layer on each prediction."""
  del key, train
  hidden = jnp.tanh(batch["x"] @ variables["params"]["w"])
  return Outputs(hidden @ variables["params"]["v"], hidden), {}


@functools.cache
def problem():
  """-> data, variables, those of the original model, the indices by role."""
  rng = np.random.default_rng(0)
  slot = np.tile(np.repeat(np.arange(EXAMPLES), PREDICTIONS // EXAMPLES), (ROWS, 1))
  alternative = np.tile(np.arange(PREDICTIONS) % 2 == 1, (ROWS, 1))
  data = {
    "x": rng.normal(size=(ROWS, PREDICTIONS, INPUTS)).astype(np.float32),
    "label": rng.integers(CLASSES, size=(ROWS, PREDICTIONS)).astype(np.int32),
    "index": np.arange(ROWS * PREDICTIONS, dtype=np.int32).reshape(ROWS, PREDICTIONS),
    "forget": np.tile((np.arange(ROWS) >= ROWS // 2)[:, None], (1, PREDICTIONS)),
    "mask": ~alternative,
    "alternative_mask": alternative,
    "example_mask": np.ones((ROWS, EXAMPLES), bool),
    "slot": slot.astype(np.int32),
  }

  def variables(seed):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(INPUTS, HIDDEN)), "v": rng.normal(size=(HIDDEN, CLASSES))}
    return {"params": jax.tree.map(np.float32, params), "batch_stats": {}}

  split = Paired(np.arange(ROWS // 2, dtype=np.int32), np.arange(ROWS // 2, ROWS, dtype=np.int32))
  return jax.device_put((data, variables(1), variables(2))), split


def make_options(name, changed):
  """`config.method` with the changed options."""
  options = config_lib.default_config().method
  options.update({"name": name, "batch_size": 3, "epochs": 2.0, "on_infeasible": "project"} | dict(changed))
  options.optimizer.learning_rate = 0.05
  return options


@functools.cache
def compiled(name, structure):
  """-> the program of a method's step and its jitted step; all else of the options is data."""
  method = methods.METHODS[name]
  program = step_lib.make_step(
    method,
    make_options(name, structure),
    forward=forward,
    fetch=fetch,
    pairing="sequential",
    train=False,
    schedule=optax.constant_schedule(1.0),
    sharpness=sub_step.Sharpness() if is_sharp(method) else None,
    mask_scope="update" if method.needs_mask else None,
  )
  return program, jax.jit(program.step)


def is_sharp(method):
  """Whether it has modes of its own, which act on sharpness-aware gradients alone."""
  return bool({"retain_mode", "forget_mode"} & method.reads)


@functools.cache
def run(name, changed):
  """-> parameters and metrics of some steps under the changed options, as one vector."""
  (data, variables, original), split = problem()
  method, options = methods.METHODS[name], make_options(name, changed)
  structure = tuple(item for item in changed if not FIELDS[f"method.{item[0]}"].traced)
  program, step = compiled(name, structure)
  sam = {"rho": 0.3, "lamb": 1.0} if is_sharp(method) else None
  hyperparameters = hyperparameters_of(options, method, sam)
  mask = jax.tree.map(lambda leaf: (leaf > 0).astype(jnp.int8), variables["params"])
  frozen = sub_step.Frozen(original, mask if method.needs_mask else None)
  plan = stage_plan.unlearning_batches(method, options, split, seed=0)
  state = create_state(variables, program.optimizers(hyperparameters), seed=0)
  seen = []
  for index in range(STEPS):
    indices = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), plan.indices(index, index + 1))
    batches = step_lib.Batches(indices, jnp.int32(plan.epochs(index, index + 1)[0]))
    state, metrics = step(state, frozen, data, batches, hyperparameters)
    seen.append(metrics)
  leaves = jax.tree.leaves(jax.device_get((state.params, seen)))
  return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in leaves])


@pytest.mark.parametrize(("name", "field"), DECLARED)
def test_a_declared_field_changes_what_is_computed(name, field):
  value, needed = OTHERS[field]
  base = tuple(sorted(needed.items()))
  before, after = run(name, base), run(name, (*base, (field, value)))
  assert before.shape != after.shape or np.abs(before - after).max() > 1e-6


def test_every_method_runs_on_what_it_declares():
  for name in methods.METHODS.keys() - {"none"}:
    assert np.isfinite(run(name, ())).all(), name


def test_reading_what_is_not_declared_fails():
  def undeclared(hyperparameters, epoch):
    del epoch
    return hyperparameters["alpha"]

  ft = methods.METHODS["ft"]
  (substep,) = ft.substeps
  sly = ft._replace(substeps=(substep._replace(retain={"ce": methods.Schedule(undeclared, ())}),))
  options = config_lib.default_config().method
  with pytest.raises(KeyError, match="alpha"):
    sly.substeps[0].coefficients(hyperparameters_of(options, sly), 0)


def test_a_model_that_is_asked_for_states_declares_the_layer():
  for name, method in methods.METHODS.items():
    needs_hidden = any(TERMS[term].needs_hidden for term in method.used_terms)
    assert ("layer" in method.reads) == needs_hidden, name
