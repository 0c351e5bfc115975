"""Sharpness-aware and masked steps: the sharpness paper's runs, and what must hold for any run."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax import config as config_lib
from hamu_jax import optimizers
from hamu_jax import step as step_lib
from hamu_jax.data import batching
from hamu_jax.methods import METHODS
from hamu_jax.paired import Paired
from hamu_jax.source import place_feed
from hamu_jax.train_state import create_state
from tests.sam_jax import nets

GOLDEN = pathlib.Path(__file__).parent / "golden" / "sam"
RUNS = json.loads((GOLDEN / "index.json").read_text())["methods"]
CLASSES = 10
BATCH = 8
# Method of a golden run, by the first part of its name.
NAMES = {
    "FT": "ft", "GA": "ga", "NG": "neggrad", "NG_sep": "sharp_minmax", "SCRUB": "scrub_distill",
    "FT_l1": "ft_l1", "RL": "salun", "RL_og": "random_label",
}


@pytest.fixture(scope="module")
def arrays():
  with np.load(GOLDEN / "methods.npz", allow_pickle=False) as archive:
    return dict(archive)


def fetch(data, rows, key):
  del key
  images, labels = data
  present = rows.clip(0)
  return {"image": images[present], "label": labels[present], "mask": rows >= 0, "row": present}


def case_of(run):
  """-> network, base optimizer, name of a golden run without its variations, those variations."""
  net, base, name = run["name"].split("/")
  key = max((key for key in NAMES if name == key or name.startswith(f"{key}_")), key=len)
  return net, base, key, name.removeprefix(key)


def golden_options(run, base, method):
  config = config_lib.default_config()
  options = config.method
  options.name = method
  options.clip_norm = 0.0
  options.epochs = float(run["unlearn_epochs"])
  options.optimizer = config_lib.optimizer_config(base, run["unlearn_lr"])
  options.optimizer.weight_decay = run["weight_decay"]
  if base == "sgd":
    options.optimizer.momentum = run["momentum"]
  if "decreasing_lr" in run:
    options.optimizer.schedule = "step"
    options.optimizer.decay_epochs = tuple(map(float, run["decreasing_lr"].split(",")))
  if method == "ft_l1":
    options.l1_weight = run["alpha"]
    options.l1_free_epochs = float(run.get("no_l1_epochs", 0))
  elif "alpha" in run:
    options.retain_weight = run["alpha"]
  if method == "scrub_distill":
    options.gamma, options.beta, options.temperature = run["gamma"], run["beta"], run["kd_T"]
    # The reference ascends in one epoch more than it is told to.
    options.msteps = run["msteps"] + 1
  return options


def golden_plan(run, arrays, method):
  """-> data, plan. Rows count the retain examples first, then those to be forgotten."""
  net = run["name"].split("/")[0]
  images, labels = (
      np.concatenate([arrays[f"{net}/{role}_{part}"] for role in Paired._fields]) for part in "xy"
  )
  sizes = [len(arrays[f"{net}/{role}_y"]) for role in Paired._fields]
  retain, forget = np.split(np.arange(sum(sizes), dtype=np.int32), sizes[:1])

  def stream(rows):
    return batching.Stream(rows, BATCH)

  if method == "scrub_distill":
    plan = batching.PassPlan(
        BATCH, Paired(stream(retain), stream(forget)), ("forget", "retain"), (run["msteps"] + 1, None)
    )
  elif method in ("random_label", "salun"):
    # Each epoch has its own copy of the data, with the labels drawn in it.
    orders, drawn = arrays[f"{run['name']}/order"], arrays[f"{run['name']}/random_labels"]
    epochs = len(orders)
    # The orders count forget first.
    rows = np.where(orders < len(forget), orders + len(retain), orders - len(forget))
    batches = [
        batching.Stream((row + epoch * len(labels)).astype(np.int32), BATCH).batches(0, 13)
        for epoch, row in enumerate(rows)
    ]
    images = np.concatenate([images] * epochs)
    labels = np.concatenate([np.concatenate([labels[retain], row]) for row in drawn])
    plan = batching.BatchPlan(BATCH, Paired(stream(np.concatenate(batches).ravel()), None))
  else:
    used = METHODS[method].roles
    plan = batching.BatchPlan(BATCH, Paired(*(
        stream(rows) if role in used else None
        for role, rows in zip(Paired._fields, (retain, forget))
    )))
  return (nets.inputs(net, images), jnp.asarray(labels, jnp.int32)), plan


def mask_scope(run, key, variation):
  if not run["masked"]:
    return None
  # As published the clean gradient is masked only in the *_intended runs.
  return "perturbed" if "_sam" in variation and "intended" not in variation else "gradient"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_reproduces_the_reference_run(x64, arrays, run):
  net, base, key, variation = case_of(run)
  method = METHODS[NAMES[key]]
  options = golden_options(run, base, NAMES[key])
  data, plan = golden_plan(run, arrays, NAMES[key])
  if key in ("RL", "RL_og"):
    (substep,) = method.substeps
    method = method._replace(substeps=(substep._replace(retain={"ce": 1.0}),))
  sam = {"rho": run["rho"], "lamb": run["lamb"]} if "sam" in run else None
  program = step_lib.make_step(
      method, options, forward=nets.forward(nets.make(net, CLASSES)), fetch=fetch,
      pairing="sequential", train=True,
      schedule=optimizers.schedule_shape(options.optimizer, plan.position, run["steps"][-1]),
      sharpness=sam and step_lib.Sharpness(run["adaptive"], run["sam"], "auto"),
      mask_scope=mask_scope(run, key, variation),
  )
  variables = {
      "params": nets.params(net, CLASSES, arrays[f"{net}/init_params"]),
      "batch_stats": nets.batch_stats(net, arrays[f"{net}/init_buffers"]),
  }
  reference = variables
  if net == "mlp":
    reference = {**variables, "params": nets.params(net, CLASSES, arrays["mlp/scrub_teacher_params"])}
  mask = nets.params(net, CLASSES, arrays[f"{net}/mask"])
  settings = step_lib.settings_of(options, sam)
  chunk = jax.jit(step_lib.make_chunk(program.step))
  steps = run["steps"]
  feed = place_feed(plan.rows(0, steps[-1]), plan.epochs(0, steps[-1]), None)
  for index, count in enumerate(steps):
    state = create_state(variables, program.optimizers(settings), seed=0)
    state, _, done = chunk(
        state, step_lib.Frozen(reference, mask), data, feed, jnp.int32(count), settings
    )
    assert int(done) == count
    np.testing.assert_allclose(
        nets.flat_params(net, CLASSES, state.params), arrays[f"{run['name']}/params"][index],
        rtol=0, atol=1e-9,
    )
    if net == "conv":
      wanted = nets.batch_stats(net, arrays[f"{run['name']}/buffers"][index])
      jax.tree.map(
          lambda got, leaf: np.testing.assert_allclose(got, leaf, rtol=0, atol=1e-9),
          dict(state.batch_stats), wanted,
      )
