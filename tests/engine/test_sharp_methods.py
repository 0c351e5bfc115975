"""Sharpness-aware and masked steps: the sharpness paper's runs, and what must hold for any run."""

import json
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from hamu_jax import data as data_lib
from hamu_jax import transforms
from hamu_jax.config import default as config_lib
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.data import batching
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import methods, objectives, optimizers, pairing, sub_step
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.methods import METHODS
from hamu_jax.engine.placement import place, place_batches
from hamu_jax.engine.train_state import create_state
from hamu_jax.paired import Paired
from hamu_jax.vision.feed import ImageData
from hamu_jax.vision.task import make_fetch
from tests.sam_jax import nets

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "sam"
RUNS = json.loads((GOLDEN / "index.json").read_text())["methods"]
CLASSES = 10
BATCH = 8
# Method of a golden run, by the first part of its name.
NAMES = {
  "FT": "ft",
  "GA": "ga",
  "NG": "neggrad",
  "NG_sep": "sharp_minmax",
  "SCRUB": "scrub_distill",
  "FT_l1": "ft_l1",
  "RL": "salun",
  "RL_og": "random_label",
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


def golden_data(arrays, net):
  """All examples, first those to be retained."""
  images, labels = (
    np.concatenate([arrays[f"{net}/{role}_{part}"] for role in Paired._fields]) for part in "xy"
  )
  indices = np.arange(len(labels), dtype=np.int32)
  forget = indices >= len(arrays[f"{net}/retain_y"])
  return ImageData(nets.inputs(net, images), labels.astype(np.int32), forget, indices)


def golden_plan(run, arrays, method):
  """-> data, plan: the reference's loaders take slices of 8, in order."""
  data = golden_data(arrays, run["name"].split("/")[0])
  retain, forget = data.ids[~data.forget], data.ids[data.forget]

  def stream(indices):
    return batching.Stream(indices, BATCH)

  if method == "scrub_distill":
    return data, batching.PassPlan(
      BATCH,
      Paired(stream(retain), stream(forget)),
      order=("forget", "retain"),
      active=(run["msteps"] + 1, None),
    )
  if method not in ("random_label", "salun"):
    used = METHODS[method].roles
    return data, batching.BatchPlan(
      BATCH,
      Paired(
        *(
          stream(indices) if role in used else None for role, indices in zip(Paired._fields, (retain, forget))
        )
      ),
    )
  # Each epoch has its own copy of the data, with the labels drawn in it.
  orders, drawn = arrays[f"{run['name']}/order"], arrays[f"{run['name']}/random_labels"]
  copies = jax.tree.map(lambda leaf: np.concatenate([leaf] * len(orders)), data)
  labels = np.concatenate([np.append(data.labels[retain], labels) for labels in drawn])
  # The reference's orders count forget first.
  indices = np.where(orders < len(forget), orders + len(retain), orders - len(forget))
  indices += len(data.ids) * np.arange(len(orders))[:, None]
  plan = batching.BatchPlan(BATCH, Paired(stream(indices.astype(np.int32).ravel()), None))
  return copies._replace(labels=labels.astype(np.int32)), plan


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
      method,
      options,
      forward=nets.forward(nets.make(net, CLASSES)),
      fetch=make_fetch("none"),
      pairing="sequential",
      train=True,
      schedule=optimizers.schedule_shape(options.optimizer, plan.position, run["steps"][-1]),
      sharpness=mode and sub_step.Sharpness(run["adaptive"], mode),
      mask_scope=scope,
    )
    _PROGRAMS[key] = program, jax.jit(program.step)
  return _PROGRAMS[key]


def check_run(arrays, run):
  net, base, key, _ = case_of(run)
  options = golden_options(run, base, NAMES[key])
  data, plan = golden_plan(run, arrays, options.name)
  program, step = golden_program(run, options, plan)
  hyperparameters = hyperparameters_of(options, methods.METHODS[options.name], run if "sam" in run else None)
  state = create_state(golden_variables(arrays, net), program.optimizers(hyperparameters), seed=0)
  teacher = golden_variables(
    arrays, net, "scrub_teacher_params" if key == "SCRUB" and net == "mlp" else "init_params"
  )
  frozen = sub_step.Frozen(teacher, nets.params(net, CLASSES, arrays[f"{net}/mask"]))
  indices, epochs = plan.indices(0, run["steps"][-1]), plan.epochs(0, run["steps"][-1])
  states = [s for s, _ in one_by_one(step, state, frozen, data, indices, epochs, hyperparameters)]
  for index, number in enumerate(run["steps"]):
    state = states[number - 1]
    close(nets.flat_params(net, CLASSES, state.params), arrays[f"{run['name']}/params"][index])
    if net == "conv":
      wanted = nets.batch_stats(net, arrays[f"{run['name']}/buffers"][index])
      jax.tree.map(close, dict(state.batch_stats), wanted)


def one_by_one(step, state, frozen, data, indices, epochs, hyperparameters):
  """The state and the metrics after each step."""
  for number in range(len(epochs)):
    batches = jax.tree.map(lambda leaf: leaf[number], step_lib.Batches(indices, epochs))
    state, metrics = step(state, frozen, data, batches, hyperparameters)
    yield state, metrics


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


SHARP = sub_step.Sharpness(adaptive=True, mode="min")
# Two steps of uneven batches: 11 and 12 retain examples, 7 and 12 to be forgotten.
ROWS = Paired(
  retain=np.array([[*range(11), -1], [*range(12, 24)]], np.int32),
  forget=np.array([[*range(61, 68), *[-1] * 5], [*range(70, 82)]], np.int32),
)
FIRST = jax.tree.map(lambda indices: indices[:1], ROWS)


def own_options(name, **hyperparameters):
  options = config_lib.default_config().method
  options.update(
    {
      "name": name,
      "epochs": 2.0,
      "on_infeasible": "project",
      "constraint_ratio": 0.05,
      "retain_weight": 0.6,
      "msteps": 1,
      "l1_weight": 1e-2,
      "clip_norm": 0.5,
      **hyperparameters,
    }
  )
  options.optimizer.update({"learning_rate": 0.1, "weight_decay": 0.05})
  return options


def run_steps(
  arrays,
  method,
  options,
  indices,
  epochs,
  *,
  net="conv",
  kind="sequential",
  train=False,
  sharpness=SHARP,
  mask_scope=None,
  variables=None,
):
  """-> state after the steps, metrics of each."""
  mesh = axis = None
  if kind == "pmap":
    mesh = pairing.make_mesh(jax.devices()[:4], method.device_groups)
    axis = pairing.DATA_AXIS
  program = step_lib.make_step(
    method,
    options,
    forward=nets.forward(nets.make(net, CLASSES), axis),
    fetch=make_fetch("none"),
    pairing=kind,
    train=train,
    schedule=optax.constant_schedule(1.0),
    sharpness=sharpness,
    mask_scope=mask_scope,
  )
  hyperparameters = hyperparameters_of(options, method, {"rho": 0.5, "lamb": 0.7})
  variables = variables or golden_variables(arrays, net)
  state = create_state(variables, program.optimizers(hyperparameters), seed=0)
  teacher = {**variables, "params": jax.tree.map(lambda leaf: 1.1 * leaf, variables["params"])}
  frozen = sub_step.Frozen(teacher, nets.params(net, CLASSES, arrays[f"{net}/mask"]))
  state, frozen, data = place((state, frozen, golden_data(arrays, net)), mesh)
  indices = Paired(
    *(role_indices if role in method.roles else None for role, role_indices in indices._asdict().items())
  )
  epochs = np.asarray(epochs, np.int32)
  if mesh is None:
    metrics = []
    for state, step_metrics in one_by_one(
      jax.jit(program.step), state, frozen, data, indices, epochs, hyperparameters
    ):
      metrics.append(step_metrics)
    metrics = jax.tree.map(lambda *leaves: np.stack(leaves), *metrics)
  else:
    batches = place_batches(pairing.shard_indices(indices, mesh), epochs, mesh)
    arguments = state, frozen, data, batches, np.int32(len(epochs)), hyperparameters
    chunk = chunk_lib.compile_target(chunk_lib.make_chunk(program.step), mesh, method.roles)
    state, metrics, _ = chunk(*arguments)
    metrics = jax.tree.map(lambda leaf: leaf[: len(epochs)], metrics)
  assert int(state.step) == len(epochs)
  return jax.device_get((state, metrics))


@pytest.mark.parametrize(
  ("name", "scope", "net", "train"),
  [
    # With batch norm the halves of the devices exchange statistics as well.
    ("hamu-q", "role", "conv", True),
    ("neggrad", "step", "conv", True),
    # Each half computes its own terms alone.
    ("scrub", "role", "mlp", False),
    pytest.param("hamu-q", "role", "conv", False, marks=pytest.mark.slow),
    pytest.param("neggrad", "step", "conv", False, marks=pytest.mark.slow),
  ],
)
def test_pairings_agree_on_sharpness_aware_gradients(x64, arrays, name, scope, net, train):
  wanted, *others = (
    run_steps(
      arrays,
      METHODS[name],
      own_options(name),
      ROWS,
      [0, 0],
      net=net,
      kind=kind,
      train=train,
      sharpness=SHARP._replace(scope=scope),
    )
    for kind in ("sequential", "vmap", "pmap")
  )
  for got in others:
    jax.tree.map(close, got, wanted)


def passes():
  """Both sets in turn, forget in the first of two epochs only; a pass ends with a short batch."""
  plan = data_lib.pass_plan(
    Paired(np.arange(20), np.arange(61, 76)),
    ("forget", "retain"),
    (1, None),
    batch_size=12,
    seed=0,
  )
  assert plan.num_steps(2) == 6
  return plan.indices(0, 6), plan.epochs(0, 6)


@pytest.mark.parametrize(
  ("name", "net", "scope"),
  [
    ("sharp_minmax", "conv", "update"),
    ("scrub_distill", "conv", None),
    pytest.param("ft_l1", "mlp", None, marks=pytest.mark.slow),
    ("salun", "mlp", "perturbed"),
  ],
)
def test_devices_agree_for_methods_without_pairs(x64, arrays, name, net, scope):
  """All of them work on one batch; the random labels are those of the examples, not of the devices."""
  indices, epochs = passes() if name == "scrub_distill" else (ROWS, [0, 1])
  if name == "salun":
    indices = Paired(np.concatenate(ROWS, axis=1), None)
  wanted, got = (
    run_steps(
      arrays,
      METHODS[name],
      own_options(name),
      indices,
      epochs,
      net=net,
      kind=kind,
      train=True,
      mask_scope=scope,
    )
    for kind in ("sequential", "pmap")
  )
  jax.tree.map(close, got, wanted)


def mean_cross_entropy(data, indices, params, weight=1.0):
  """Of the golden multilayer perceptron, by itself; times a weight."""
  indices = indices[indices >= 0]
  hidden = jnp.maximum(data.images[indices] @ params["fc1"]["kernel"] + params["fc1"]["bias"][None], 0)
  logits = hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"][None]
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels[indices])
  return weight * losses.mean()


@partial(jax.jit, static_argnums=0)
def sharp_by_hand(loss, params, rho=0.5, lamb=0.7):
  """The adaptive sharpness-aware gradient, all weights in one vector."""
  w, restore = ravel_pytree(params)
  gradient = jax.grad(lambda w: loss(restore(w)))
  g0 = gradient(w)
  g1 = gradient(w + rho * w**2 * g0 / jnp.linalg.norm(jnp.abs(w) * g0))
  return restore((1 - lamb) * g0 + lamb * g1)


@pytest.mark.parametrize("name", ["hamu-q", "gru"])
def test_a_pair_of_sharpness_aware_gradients_is_clipped_and_then_transformed(x64, arrays, name):
  """HAMU on sharpness-aware gradients: each role perturbs the model by its own gradient."""
  options = own_options(name)
  rate, most = options.optimizer.learning_rate, options.clip_norm
  options.optimizer.weight_decay = 0.0
  state, metrics = run_steps(arrays, METHODS[name], options, FIRST, [0], net="mlp")
  params, data = golden_variables(arrays, "mlp")["params"], golden_data(arrays, "mlp")
  sharp = Paired(*(sharp_by_hand(partial(mean_cross_entropy, data, indices[0]), params) for indices in ROWS))
  norms = Paired(*(optax.tree.norm(gradient) for gradient in sharp))
  assert min(norms) > 1.1 * most
  close(metrics["retain_grad_norm"][0], norms.retain)
  close(metrics["forget_grad_norm"][0], norms.forget)
  clipped = Paired(
    *(
      jax.tree.map(lambda leaf: leaf * most / (norm + 1e-6), gradient) for gradient, norm in zip(sharp, norms)
    )
  )
  transform = transforms.gru()
  if name == "hamu-q":
    transform = transforms.hamu(rate, rate * options.constraint_ratio, on_infeasible="project")
  update, _ = jax.jit(transform.update)(clipped.retain, transform.init(params), forget_grads=clipped.forget)
  jax.tree.map(lambda got, w, g: close(got, w - rate * g), state.params, params, update)


def test_each_half_of_a_joint_loss_may_be_perturbed_by_its_own_gradient(x64, arrays):
  """neggrad at scope "role"; the reference's runs are at "step", by the joint gradient."""
  options = own_options("neggrad", clip_norm=0.0)
  options.optimizer.weight_decay = 0.0
  params, data = golden_variables(arrays, "mlp")["params"], golden_data(arrays, "mlp")
  retain, forget = (
    sharp_by_hand(partial(mean_cross_entropy, data, indices[0], weight=weight), params)
    for indices, weight in zip(ROWS, (0.6, -0.4))
  )
  state, _ = run_steps(
    arrays,
    METHODS["neggrad"],
    options,
    FIRST,
    [0],
    net="mlp",
    sharpness=SHARP._replace(scope="role"),
  )
  jax.tree.map(lambda got, w, r, f: close(got, w - 0.1 * (r + f)), state.params, params, retain, forget)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_sharp_minmax_moves_each_weight_by_one_of_its_halves(x64, arrays, base):
  """The retain half outside the mask and the forget half inside, weight decay and all."""
  options = own_options("sharp_minmax")
  options.optimizer.name = base
  start = golden_variables(arrays, "mlp")
  mask = nets.params("mlp", CLASSES, arrays["mlp/mask"])

  def moved_by(method, variables):
    state, _ = run_steps(
      arrays, method, options, FIRST, [0], net="mlp", mask_scope="update", variables=variables
    )
    return state.params

  whole = METHODS["sharp_minmax"]
  halves = [whole._replace(substeps=(substep,)) for substep in whole.substeps]
  after_retain = moved_by(halves[0], start)
  after_forget = moved_by(halves[1], {**start, "params": after_retain})
  after_both = moved_by(whole, start)

  def check(m, w0, w1, w2, both):
    np.testing.assert_array_equal(w1 != w0, m == 0)
    np.testing.assert_array_equal(w2 != w1, m == 1)
    # The compiler may round one program otherwise than two.
    close(both, w2, 1e-12)

  jax.tree.map(check, mask, start["params"], after_retain, after_forget, after_both)


@jax.jit
def drawn_labels(epoch_key, indices, forget):
  """The labels on which `random_label_cross_entropy` trains; the true one is 3."""
  # Of logits -k the cross-entropy of class k is k more than that of class 0.
  logits = -jnp.broadcast_to(jnp.arange(CLASSES, dtype=jnp.float32), (len(indices), CLASSES))
  batch = {"index": indices, "forget": forget, "label": jnp.full(len(indices), 3)}
  values = objectives.random_label_cross_entropy(
    objectives.Outputs(logits), objectives.Context(batch, None, None, epoch_key, {})
  )
  return jnp.rint(values - jax.nn.logsumexp(logits[0])).astype(int)


def test_random_labels_are_uniform_and_of_the_forget_rows_only():
  indices = np.arange(6000)
  forget = indices % 6 != 0
  first, second = (np.asarray(drawn_labels(jax.random.key(seed), indices, forget)) for seed in range(2))
  np.testing.assert_array_equal(first[~forget], 3)
  for labels in (first[forget], second[forget]):
    counts = np.bincount(labels, minlength=CLASSES)
    # The 1e-6 quantile of chi-square with 9 degrees of freedom is 46.
    assert np.sum((counts - 500) ** 2 / 500) < 46
  # Independent draws agree in a tenth: 500 +- 21.
  assert 400 < np.sum(first[forget] == second[forget]) < 600


def test_random_labels_do_not_depend_on_the_batch():
  key, indices, forget = jax.random.key(5), np.arange(100), np.ones(100, bool)
  whole = drawn_labels(key, indices, forget)
  order = np.random.default_rng(0).permutation(100)
  np.testing.assert_array_equal(drawn_labels(key, indices[order], forget), whole[order])
  np.testing.assert_array_equal(drawn_labels(key, indices[40:50], forget[:10]), whole[40:50])


def test_random_labels_are_redrawn_each_epoch_and_last_for_it(x64, arrays):
  """Three steps of an epoch and one of the next; at a rate of 0 only labels change the loss."""
  options = own_options("random_label")
  options.optimizer.learning_rate = 0.0
  indices = np.arange(61, 73, dtype=np.int32)
  indices = Paired(np.stack([indices, indices[::-1], indices, indices]), None)
  _, metrics = run_steps(
    arrays, METHODS["random_label"], options, indices, [0, 0, 0, 1], net="mlp", sharpness=None
  )
  same, reversed_, later, redrawn = metrics["retain_random_label"]
  close([reversed_, later], same, 1e-12)
  assert abs(redrawn - same) > 1e-3
  # The logged loss is of the true labels.
  np.testing.assert_allclose(metrics["retain_loss"], metrics["retain_loss"][0])
  assert abs(metrics["retain_loss"][0] - same) > 1e-3
