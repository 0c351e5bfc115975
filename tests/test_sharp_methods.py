"""Sharpness-aware and masked steps: the sharpness paper's runs, and what must hold for any run."""

import json
import pathlib

import jax
import numpy as np
import pytest

from hamu_jax import config as config_lib
from hamu_jax import optimizers
from hamu_jax import step as step_lib
from hamu_jax.data import batching
from hamu_jax.methods import METHODS
from hamu_jax.paired import Paired
from hamu_jax.source import ImageData
from hamu_jax.train_state import create_state
from hamu_jax.vision import make_fetch
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
  rows = np.arange(len(labels), dtype=np.int32)
  return ImageData(nets.inputs(net, images), labels.astype(np.int32), rows >= sizes[0], rows), plan


def golden_variables(arrays, net, params="init_params"):
  return {
      "params": nets.params(net, CLASSES, arrays[f"{net}/{params}"]),
      "batch_stats": nets.batch_stats(net, arrays[f"{net}/init_buffers"]),
  }


def mask_scope(run, variation):
  if not run["masked"]:
    return None
  # The reference masks the clean gradient of a sharpness-aware one in its *_intended runs only.
  return "perturbed" if "_sam" in variation and "intended" not in variation else "gradient"


_PROGRAMS = {}


def golden_program(run, options, plan):
  """-> step program, its jitted step; runs that differ in values only share them."""
  net, base, name, variation = case_of(run)
  scope, mode = mask_scope(run, variation), run.get("sam")
  key = net, base, NAMES[name], scope, mode, options.optimizer.schedule
  if key not in _PROGRAMS:
    method = METHODS[options.name]
    if name in ("RL", "RL_og"):
      # The reference's labels are in the data, instead of drawn.
      (substep,) = method.substeps
      method = method._replace(substeps=(substep._replace(retain={"ce": 1.0}),))
    program = step_lib.make_step(
        method, options, forward=nets.forward(nets.make(net, CLASSES)), fetch=make_fetch("none"),
        pairing="sequential", train=True,
        schedule=optimizers.schedule_shape(options.optimizer, plan.position, run["steps"][-1]),
        sharpness=mode and step_lib.Sharpness(run["adaptive"], mode),
        mask_scope=scope,
    )
    _PROGRAMS[key] = program, jax.jit(program.step, compiler_options=nets.QUICK_COMPILE)
  return _PROGRAMS[key]


def check_run(arrays, run):
  net, base, key, _ = case_of(run)
  options = golden_options(run, base, NAMES[key])
  data, plan = golden_plan(run, arrays, options.name)
  program, step = golden_program(run, options, plan)
  settings = step_lib.settings_of(options, run if "sam" in run else None)
  state = create_state(golden_variables(arrays, net), program.optimizers(settings), seed=0)
  teacher = golden_variables(
      arrays, net, "scrub_teacher_params" if key == "SCRUB" and net == "mlp" else "init_params"
  )
  frozen = step_lib.Frozen(teacher, nets.params(net, CLASSES, arrays[f"{net}/mask"]))
  rows, epochs = plan.rows(0, run["steps"][-1]), plan.epochs(0, run["steps"][-1])
  for number in range(run["steps"][-1]):
    feed = jax.tree.map(lambda leaf: leaf[number], step_lib.Feed(rows, epochs))
    state, _ = step(state, frozen, data, feed, settings)
    if number + 1 in run["steps"]:
      index = run["steps"].index(number + 1)
      close(
          nets.flat_params(net, CLASSES, state.params), arrays[f"{run['name']}/params"][index]
      )
      if net == "conv":
        wanted = nets.batch_stats(net, arrays[f"{run['name']}/buffers"][index])
        jax.tree.map(close, dict(state.batch_stats), wanted)
  assert int(state.step) == run["steps"][-1]


def close(got, wanted, atol=1e-9):
  np.testing.assert_allclose(got, wanted, rtol=0, atol=atol)


# Batch norm, and the optimizer in which weight decay and the gradient's size matter most.
MAIN = [run for run in RUNS if run["name"].startswith("conv/sgd/")]
OTHER = [run for run in RUNS if run not in MAIN]


@pytest.mark.parametrize("run", MAIN, ids=lambda run: run["name"])
def test_reproduces_the_reference_run(x64, arrays, run):
  check_run(arrays, run)


@pytest.mark.slow
@pytest.mark.parametrize("run", OTHER, ids=lambda run: run["name"])
def test_reproduces_the_reference_run_of_other_networks_and_optimizers(x64, arrays, run):
  check_run(arrays, run)
