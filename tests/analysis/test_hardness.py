"""Hardness against closed forms and brute force, the preview against the step that is then taken."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from hamu_jax import main
from hamu_jax.analysis import forecast, hardness, hardness_plots, preview
from hamu_jax.config import command_line as config_command_line
from hamu_jax.config import validation
from hamu_jax.engine import loop, methods
from hamu_jax.engine import stage as stage_lib
from hamu_jax.engine.train_state import create_state
from hamu_jax.experiment import experiment
from hamu_jax.run import preemption
from hamu_jax.run.rundir import read_metrics
from hamu_jax.transforms import BRANCHES, hamu
from tests.arguments import replaced

ROOT = pathlib.Path(__file__).parent.parent.parent
RATE = 0.1
SMALL = [
  f"--config={ROOT / 'configs' / 'digits_hamu.py'}",
  "--config.model.name=mlp",
  "--config.train.epochs=3",
  "--config.train.evaluate_epochs=3",
  "--config.method.max_steps=1",
  "--config.method.batch_size=64",
  "--config.method.evaluate_epochs=0",
  "--config.method.optimizer.learning_rate=0.1",
  "--config.retrain=False",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The workdir of a finished preview with two batch pairs, and what it printed."""
  path = tmp_path_factory.mktemp("hardness") / "run"
  assert hardness.run(["hardness", *SMALL, f"--workdir={path}", "--batches=2"]) == 0
  return path


@pytest.fixture(scope="module")
def report(folder):
  return json.loads((folder / "hardness.json").read_text())


@pytest.fixture
def make_config(folder):
  """-> function: the small configuration with other values, on the same original model."""

  def make(**overrides):
    config = config_command_line.parse(["hardness", *SMALL]).config
    config.stage_cache = str(folder / "stages")
    with config.unlocked():
      config.update_from_flattened_dict(overrides)
    validation.validate(config)
    return config

  return make


def _measure(retain, forget, **options):
  options = {"learning_rate": RATE, "constraint": 0.0} | options
  return forecast.hardness(jnp.asarray(retain), jnp.asarray(forget), **options)


def test_parallel_gradients_pay_for_all_of_the_constraint():
  # |g_r| = 5, |g_f| = 10: at most lr * 50; half of that is half of the plain step, backwards.
  found = _measure([3.0, 4.0], [6.0, 8.0], constraint=RATE * 25)
  np.testing.assert_allclose(found.angle, [0], atol=1e-3)
  np.testing.assert_allclose(found.feasible_ratio, [50], rtol=1e-6)
  np.testing.assert_allclose(found.free_ratio, [0], atol=1e-4)
  np.testing.assert_allclose(found.progress, [-0.5], rtol=1e-6)
  assert BRANCHES[found.branch[0]] == "colinear" and not found.infeasible[0]
  # d = c g_f / |g_f|^2.
  np.testing.assert_allclose(found.retain_weight, [0], atol=1e-6)
  np.testing.assert_allclose(found.forget_weight, [25 / 100], rtol=1e-6)


def test_orthogonal_gradients_share_the_radius():
  found = _measure([3.0, 0.0], [0.0, 2.0], constraint=RATE * 6 * 0.6)
  np.testing.assert_allclose(found.angle, [90], atol=1e-4)
  np.testing.assert_allclose([found.feasible_ratio[0], found.free_ratio[0]], [6, 6], rtol=1e-6)
  # A 3-4-5 triangle: 0.6 of the radius along one, 0.8 along the other.
  np.testing.assert_allclose(found.progress, [0.8], rtol=1e-6)
  np.testing.assert_allclose(found.retain_weight, [0.8], rtol=1e-6)
  np.testing.assert_allclose(found.forget_weight, [0.6 * 3 / 2], rtol=1e-6)
  assert BRANCHES[found.branch[0]] == "rectified"


def test_opposed_gradients_pay_nothing():
  found = _measure([1.0, 0.0], [-3.0, 0.0], constraint=RATE * 2.9)
  np.testing.assert_allclose(found.angle, [180], atol=1e-3)
  np.testing.assert_allclose([found.feasible_ratio[0], found.free_ratio[0]], [3, 3], rtol=1e-6)
  np.testing.assert_allclose(
    [found.progress[0], found.retain_weight[0], found.forget_weight[0]], [1, 1, 0], atol=1e-6
  )
  assert BRANCHES[found.branch[0]] == "direct"


@pytest.mark.parametrize("variant", ("hamu-q", "hamu-u"))
def test_gradients_that_are_zero_leave_numbers(variant):
  trees = [{"a": np.zeros(3), "b": np.ones(2)}, {"a": np.zeros(3), "b": np.zeros(2)}]
  for retain in trees:
    for forget in trees:
      found = forecast.hardness(
        *jax.tree.map(jnp.float32, (retain, forget)), learning_rate=RATE, constraint=0.01, variant=variant
      )
      for name, value in found._asdict().items():
        assert not np.isnan(value).any(), name


OPTIONS = [
  {},
  {"variant": "hamu-u"},
  {"share": "equal"},
  {"share": "exp_neg_dot", "variant": "hamu-u"},
  {"share": "grad_norm", "normalize_share": False},
  {"radius": 0.03, "share": "equal"},
  {"scope": "global"},
  {"scope": "global", "radius": 0.03, "variant": "hamu-u"},
]


def _gradients(seed):
  rng = np.random.default_rng(seed)
  trees = [{"a": rng.normal(size=(3, 2)), "b": rng.normal(size=5), "c": rng.normal(size=1)} for _ in range(2)]
  return jax.tree.map(np.float32, trees)


def _shares(retain, forget, options):
  """Each block's part of the constraint, as defined."""
  if options.get("scope") == "global":
    return np.ones(1)
  products = np.array([np.linalg.norm(r) * np.linalg.norm(f) for r, f in zip(retain, forget)])
  match options.get("share", "grad_norm"):
    case "equal":
      return np.full(len(retain), 1 / len(retain))
    case "exp_neg_dot":
      weights = np.exp([-r @ f for r, f in zip(retain, forget)])
      return weights / weights.sum()
  return products if not options.get("normalize_share", True) else products / products.sum()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_feasible_ratio_is_where_the_step_becomes_infeasible(options):
  retain, forget = _gradients(0)
  found = forecast.hardness(retain, forget, learning_rate=RATE, constraint=0.0, **options)

  blocks = [[leaf.ravel() for leaf in jax.tree.leaves(tree)] for tree in (retain, forget)]
  if options.get("scope") == "global":
    blocks = [[np.concatenate(parts)] for parts in blocks]
  shares = _shares(*blocks, options)
  first, second = blocks[::-1] if options.get("variant") == "hamu-u" else blocks
  expected = [
    options.get("radius", RATE * np.linalg.norm(r)) * np.linalg.norm(f) / s / RATE
    for r, f, s in zip(first, second, shares)
  ]
  np.testing.assert_allclose(found.feasible_ratio, expected, rtol=1e-5)

  def stops(ratio):
    transform = hamu(RATE, ratio * RATE, **options)
    _, state = transform.update(retain, transform.init(retain), forget_grads=forget)
    return state.stop != 0, state.diagnostics

  most = float(found.feasible_ratio.min())
  stopped, diagnostics = stops(0.999 * most)
  assert not stopped and stops(1.001 * most)[0]
  np.testing.assert_allclose(diagnostics.feasible_ratio, most, rtol=1e-6)
  # Just above the aggregate criterion's ratio it is met, just below not.
  for factor, is_met in ((0.999, False), (1.001, True)):
    assert bool(stops(factor * float(found.stopping_ratio))[1].stopping_met) == is_met


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("share_of_most", (0.2, 0.9))
def test_weights_and_progress_are_those_of_the_step(options, share_of_most):
  retain, forget = _gradients(1)
  most = float(
    forecast.hardness(retain, forget, learning_rate=RATE, constraint=0.0, **options).feasible_ratio.min()
  )
  ratio = share_of_most * most
  found = forecast.hardness(retain, forget, learning_rate=RATE, constraint=ratio * RATE, **options)
  transform = hamu(RATE, ratio * RATE, **options)
  updates, state = transform.update(retain, transform.init(retain), forget_grads=forget)
  np.testing.assert_array_equal(found.branch, state.diagnostics.branch)
  np.testing.assert_array_equal(found.angle, state.diagnostics.angle)

  leaves = list(zip(*map(jax.tree.leaves, (retain, forget, updates))))
  if options.get("scope") == "global":
    leaves = [[np.concatenate([np.ravel(x) for x in column]) for column in zip(*leaves)]]
  is_u = options.get("variant") == "hamu-u"
  for t, (r, f, gradient) in enumerate(leaves):
    step = -RATE * np.asarray(gradient, np.float64)
    weighted = RATE * (-found.retain_weight[t] * r + found.forget_weight[t] * f)
    np.testing.assert_allclose(weighted, step, rtol=2e-3, atol=1e-5)
    first = -f if is_u else r
    radius = options.get("radius", RATE * np.linalg.norm(first))
    got = -np.sum(first * step) / radius / np.linalg.norm(first)
    np.testing.assert_allclose(found.progress[t], got, atol=1e-4)
    # The closed form of the paper's problem.
    share = np.arcsin(np.minimum(state.diagnostics.feasibility[t], 1))
    angle = np.radians(found.angle[t])
    closed = 1.0 if np.cos(angle) <= -np.sin(share) else np.sin(angle - share)
    np.testing.assert_allclose(found.progress[t], closed, atol=1e-4)


@pytest.mark.parametrize("degrees", (20, 75, 110))
def test_progress_and_the_free_ratio_against_all_steps_in_the_plane(degrees):
  """The best of 200,000 steps on the circle and inside it."""
  angle = np.radians(degrees)
  retain, forget = np.array([2.0, 0.0]), 1.5 * np.array([np.cos(angle), np.sin(angle)])
  radius = RATE * 2
  around = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
  steps = np.concatenate(
    [length * np.stack([np.cos(around), np.sin(around)], 1) for length in radius * np.linspace(0.1, 1, 10)]
  )

  def best(ratio):
    allowed = steps[steps @ forget >= ratio * RATE]
    return -(allowed @ retain).min() / radius / 2

  found = _measure(np.float32(retain), np.float32(forget), constraint=RATE * 2.0)
  assert found.progress[0] == pytest.approx(best(2.0), abs=2e-3)
  free = float(found.free_ratio[0])
  assert best(free * 0.99) >= -1e-3
  if degrees < 90:
    assert free == pytest.approx(3 * np.sin(angle), rel=1e-5) and best(free * 1.02) < 0


def test_first_order_change_is_the_dot_product():
  rng = np.random.default_rng(0)
  gradient, update = ({"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)} for _ in range(2))
  expected = [np.sum(gradient[name] * update[name]) for name in "ab"]
  np.testing.assert_allclose(
    forecast.first_order_change(*jax.tree.map(jnp.float32, (gradient, update))), expected, rtol=1e-5
  )


def test_a_preview_measures_what_the_first_step_then_does(folder, report, monkeypatch):
  """`main` in the same workdir takes the model from the cache, and its first step is the previewed one."""
  ran = []
  run = loop.Loop.run

  def recorded(self, members, path):
    ran.extend(member.stage.name for member in members)
    return run(self, members, path)

  monkeypatch.setattr(loop.Loop, "run", recorded)
  assert not (folder / "config.json").exists()
  # The preview has not taken possession of the workdir.
  assert main.run(["hamu_jax.main", *SMALL, f"--workdir={folder}"]) == 0
  assert ran == ["unlearn"]
  (row,) = [row for row in read_metrics(folder).rows if row["split"] == "step"]
  blocks = report["blocks"]
  for field, mine in (("angle", "angle"), ("retain_norm", "retain_norm"), ("forget_norm", "forget_norm")):
    np.testing.assert_allclose([block[mine]["first"] for block in blocks], row[field], rtol=1e-3)
  assert [block["branch"]["first"] for block in blocks] == [BRANCHES[code] for code in row["branch"]]
  assert report["limits"]["feasible_ratio"]["first"] == pytest.approx(row["feasible_ratio"], rel=1e-4)
  stopping = row["stopping_rhs"] / row["learning_rate"]
  assert report["limits"]["stopping_ratio"]["first"] == pytest.approx(stopping, rel=1e-4)
  assert report["losses"]["retain"]["first"] == pytest.approx(row["retain_loss"], rel=1e-5)
  assert report["losses"]["forget"]["first"] == pytest.approx(row["forget_loss"], rel=1e-5)
  assert report["gradients"]["forget"]["norm"]["first"] == pytest.approx(row["forget_grad_norm"], rel=1e-4)
  step = report["steps"]["hamu-q"]
  assert step["length"]["first"] == pytest.approx(row["update_norm"], rel=1e-4)
  for name in ("hardness.json", "hardness.png", "hardness.pdf"):
    assert (folder / name).exists()
  with Image.open(folder / "hardness.png") as image:
    image.verify()


def test_the_report_adds_up(report):
  assert report["pairs"] == 2 and list(report["steps"]) == ["hamu-q", "hamu-u", "gdiff", "ga"]
  assert sum(block["weights"] for block in report["blocks"]) == report["weights"]
  for role in ("retain", "forget"):
    parts = [block[f"{role}_change"]["first"] for block in report["blocks"]]
    predicted = report["steps"]["hamu-q"][role]["predicted"]["first"]
    assert sum(parts) == pytest.approx(predicted, rel=1e-4)
    assert report["whole"][f"{role}_change"]["first"] == pytest.approx(predicted, rel=1e-5)
  for step in report["steps"].values():
    # A short step does about what first order says.
    for role in ("retain", "forget"):
      assert step[role]["happened"]["first"] == pytest.approx(step[role]["predicted"]["first"], rel=0.5)
  # Of clipped gradients, what is asked is the least that the forget loss rises.
  options, gradients = report["options"], report["gradients"]["forget"]
  asked = options["constraint"] * gradients["norm"]["first"] / gradients["seen"]["first"]
  assert report["steps"]["hamu-q"]["forget"]["predicted"]["first"] >= asked * (1 - 1e-4)
  text = hardness.tables(report)
  assert all(block["name"].split(".")[0] in text for block in report["blocks"])
  assert re.match("(hard|moderate|easy): ", report["verdict"])


# Every way in which a step comes to its gradients.
CASES = [
  {"method.name": "scrub"},
  {"method.name": "ga"},
  {"method.name": "neggrad", "method.optimizer.name": "adamw", "mask.fraction": 0.3},
  {"method.name": "hamu-u", "sam.rho": 0.05, "method.clip_norm": 0.5},
  {"method.name": "gdiff", "sam.rho": 0.05, "mask.fraction": 0.5, "mask.scope": "gradient"},
]


@pytest.mark.parametrize("overrides", CASES, ids=lambda case: case["method.name"])
def test_a_previewed_step_is_the_loops_step(make_config, tmp_path, overrides):
  config = make_config(**overrides)
  look = preview.Preview(config, tmp_path, preemption.Watch())
  reads_pairs = len(methods.METHODS[config.method.name].roles) == 2
  pair = look.pair(1)
  got = look.step(config.method.name, pair).update

  start = experiment.Experiment(config, tmp_path, preemption.Watch(), record=False).start()
  stage, running = start.stage, start.loop
  program = stage_lib.stage_program(
    stage, forward=running.forward, fetch=running.fetch("none"), pairing="sequential", exchange_axes=()
  )
  settings = stage.hyperparameters
  state = create_state(start.original, program.optimizers(settings), stage.seed)
  # A method of one role has pairs of another plan; the preview is of its own rows in that.
  plan = stage.plan if reads_pairs else look._stage.plan
  data, feed = running.feed.chunk(plan, 1, 2, None)
  feed = jax.tree.map(lambda leaf: leaf[0], feed)
  after, metrics = jax.jit(program.step)(
    state.replace(step=jnp.int32(1)), start.frozen._replace(base={}), data, feed, settings
  )
  expected = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), after.params, state.params)
  assert optax.tree.norm(expected) > 1e-4
  for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-2, atol=1e-6)
  if reads_pairs:
    assert pair.losses.retain == pytest.approx(float(metrics["retain_loss"]), rel=1e-5)


def test_losses_are_those_along_the_step(make_config, tmp_path):
  """Central differences along a step are the predicted change, and nothing has moved."""
  look = preview.Preview(make_config(), tmp_path, preemption.Watch())
  pair = look.pair(0)
  step = look.step("gdiff", pair)
  half = jax.tree.map(lambda leaf: 0.5 * leaf, step.update)
  there, back = look.losses(pair, half), look.losses(pair, jax.tree.map(jnp.negative, half))
  for gradient, ahead, behind in zip(pair.gradients, there, back):
    predicted = float(forecast.first_order_change(gradient, step.update).sum())
    assert ahead - behind == pytest.approx(predicted, rel=0.01)
  assert look.losses(pair) == pair.losses


def test_on_device_halves_the_pairs_are_the_same(make_config, tmp_path):
  one, halves = (
    preview.Preview(make_config(**{"pairing": pairing}), tmp_path, preemption.Watch()).pair(0)
    for pairing in ("sequential", "pmap")
  )
  assert halves.losses.forget == pytest.approx(one.losses.forget, rel=1e-5)
  for mine, theirs in zip(*map(jax.tree.leaves, (halves.gradients, one.gradients)), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
  "overrides, notes, steps",
  (
    ({"method.name": "kl"}, "the retain gradient of kl is zero", ["kl", "hamu-q", "hamu-u", "gdiff", "ga"]),
    (
      {"method.name": "random_label", "method.optimizer.warmup_epochs": 1.0},
      r"random_label reads one stream.*\n.*warm-up",
      ["hamu-q", "hamu-u", "gdiff", "ga"],
    ),
    (
      {"method.name": "ft", "method.stop_on_loss": True, "method.max_retain_loss": 0.01},
      r"ft reads only retain batches.*\n.*above config.method.max_retain_loss",
      ["ft", "hamu-q", "hamu-u", "gdiff", "ga"],
    ),
  ),
)
def test_what_it_cannot_say_it_says(make_config, tmp_path, overrides, notes, steps):
  report = hardness.analyse(make_config(**overrides), tmp_path, batches=1)
  assert re.match(notes, "\n".join(report["notes"])), report["notes"]
  assert list(report["steps"]) == steps
  assert report["whole"]["angle"]["std"] is None
  assert "±" not in hardness.tables(report)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_has_an_answer(name):
  """A step is shown of exactly the methods of one update by batches of their own roles."""
  assert preview.can_step(name) == (
    name not in ("none", "retrain", "random_label", "salun", "scrub_distill", "sharp_minmax")
  )


@pytest.mark.parametrize(
  "arguments, message",
  (
    (["--batches=0"], "--batches=0: must be at least 1"),
    (["--batches=few"], "argument --batches: invalid int value: 'few'"),
    (["--config.method.rate=1"], "config.method.rate: no such field"),
    (["--config.method.optimizer.learning_rate=0.0"], "learning_rate=0.0: must be at least 1e-12"),
    (
      ["--config.distributed.coordinator=localhost:9", "--config.distributed.num_processes=2"],
      "num_processes=2: the preview runs in one process",
    ),
    (["--config.model.weights=/no/such.safetensors", "--config.retrain=True"], "/no/such.safetensors"),
    (["--workdir=FILE"], "--workdir=.*: .*choose another folder"),
    (["--bathces=4"], "bathces"),
  ),
)
def test_bad_input_gets_one_line_and_status_2(tmp_path, capsys, arguments, message):
  (tmp_path / "file").write_text("")
  arguments = [argument.replace("FILE", str(tmp_path / "file")) for argument in arguments]
  if not any(argument.startswith("--workdir") for argument in arguments):
    arguments.append(f"--workdir={tmp_path / 'run'}")
  assert hardness.run(replaced(["hardness", *SMALL], *arguments)) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("error: ") and re.search(message, error), error


def test_help_and_a_missing_configuration(capsys):
  assert hardness.run(["hardness", "--help"]) == 0
  assert "--batches" in capsys.readouterr().out
  assert hardness.run(["hardness"]) == 2
  assert capsys.readouterr().err.startswith("error: --config is missing")


def test_pictures_over_a_setting_and_of_predictions(report, tmp_path):
  hardness_plots.over([0.0, 1.0], [report, report], tmp_path / "over", field="rho")
  hardness_plots.calibration(["one"], [report], tmp_path / "calibration")
  for name in ("over", "calibration"):
    with Image.open(tmp_path / f"{name}.png") as image:
      image.verify()
    assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_a_language_model(tmp_path, capsys):
  """The adapter of a tiny Llama with one projection; its dropout is the step's own."""
  assert (
    hardness.run(
      [
        "hardness",
        f"--config={ROOT / 'configs' / 'tofu_smollm2_hamu.py'}:smoke",
        f"--workdir={tmp_path}",
        "--config.text.retain_size=8",
        "--config.text.forget_size=4",
        "--config.text.test_size=4",
        "--config.language.lora.targets=('q_proj',)",
        "--config.train.epochs=1",
        "--config.train.batch_size=6",
        "--config.method.name=npo",
        "--config.evaluate.generate=False",
        "--batches=1",
      ]
    )
    == 0
  )
  report = json.loads((tmp_path / "hardness.json").read_text())
  assert list(report["steps"]) == ["npo", "hamu-q", "hamu-u", "gdiff", "ga"]
  assert len(report["blocks"]) == 6 and "q_proj" in report["blocks"][0]["name"]
  for step in report["steps"].values():
    for role in ("retain", "forget"):
      assert step[role]["happened"]["first"] == pytest.approx(
        step[role]["predicted"]["first"], rel=0.3, abs=1e-6
      )
  assert report["verdict"] in " ".join(capsys.readouterr().out.split())
