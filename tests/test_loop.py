"""The loop around the step: best epoch, boundaries, placing."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hamu_jax import config as config_lib
from hamu_jax import data, evaluation, loop, methods, preemption, rundir, source
from hamu_jax import step as step_lib
from hamu_jax.objectives import Outputs
from hamu_jax.train_state import create_state
from hamu_jax.transforms.stop import Stop


def forward(variables, batch, key, train):
  del key, train
  return Outputs(batch["image"] @ variables["params"]["w"]), variables["batch_stats"]


def fetch(augment):
  del augment

  def take(arrays, rows, key):
    del key
    return data.take(arrays.images, arrays.labels, rows)

  return take


class Scripted:
  """An evaluator with a given retain accuracy at each call; forget accuracy is always 0."""

  def __init__(self, accuracies):
    self.accuracies = list(accuracies)
    self.seen = []

  def summary(self, variables):
    self.seen.append(np.asarray(variables["params"]["w"]))
    accuracy = self.accuracies[len(self.seen) - 1]
    return {
        "retain": {"accuracy": accuracy}, "forget": {"accuracy": 0.0}, "test": {"accuracy": 0.0},
        "retain_forget_auc": 0.5, "forget_test_auc": 0.5,
    }


@contextlib.contextmanager
def silent(stage, total, initial):
  class Bar:
    def update(self, step, values):
      pass

  yield Bar()


@pytest.fixture
def setup(tmp_path):
  rng = np.random.default_rng(0)
  arrays = source.ImageData(
      rng.normal(size=(32, 4)).astype(np.float32), rng.integers(0, 3, 32).astype(np.int32),
      np.zeros(32, bool), np.arange(32),
  )
  options = config_lib.default_config().train
  options.update(batch_size=8, epochs=4, evaluate_epochs=1.0)
  options.optimizer = config_lib.optimizer_config("sgd", 0.1)

  def run(accuracies, **overrides):
    options.update(overrides)
    evaluator = Scripted(accuracies)
    with preemption.Watch() as watch:
      runner = loop.Loop(
          forward=forward, fetch=fetch, source=source.Resident(arrays), evaluate=evaluator.summary,
          pairing="sequential",
          devices=(), rundir=rundir.RunDir(tmp_path), progress=silent, watch=watch,
          checkpoint_seconds=1e9,
      )
      plan = data.training_plan(np.arange(32), batch_size=8, seed=0)
      best = evaluation.selection_score if options.select == "best" else None
      stage = loop.Stage(
          "pretrain", methods.TRAINING, options, plan, 16, 0, train=True, training_mode=True, best=best
      )
      variables = {"params": {"w": jnp.zeros((4, 3))}, "batch_stats": {}}
      outcome = runner.run(stage, variables, step_lib.Frozen(), tmp_path / "checkpoints")
    return outcome, evaluator, rundir.read_metrics(tmp_path).rows

  return run


def test_training_keeps_the_best_evaluated_epoch(setup):
  outcome, evaluator, rows = setup([0.1, 0.9, 0.3, 0.9])
  np.testing.assert_array_equal(outcome.variables["params"]["w"], evaluator.seen[1])
  assert outcome.steps == 16
  assert outcome.stop == Stop.NONE
  assert [row["step"] for row in rows if row["split"] == "retain"] == [4, 8, 12, 16]
  assert [row["step"] for row in rows if row["split"] == "step"] == list(range(1, 17))


def test_or_the_last_one_on_request(setup):
  outcome, evaluator, _ = setup([0.1, 0.9, 0.3, 0.2], select="last")
  np.testing.assert_array_equal(outcome.variables["params"]["w"], evaluator.seen[3])


def test_without_a_period_only_the_end_is_evaluated(setup):
  outcome, evaluator, _ = setup([0.1], evaluate_epochs=0.0)
  assert len(evaluator.seen) == 1
  np.testing.assert_array_equal(outcome.variables["params"]["w"], evaluator.seen[0])


def test_what_a_step_says_of_an_idle_role_is_left_out():
  values = {"retain_loss": 1.0, "forget_loss": 0.0, "forget_active": False, "retain_active": True}
  assert loop._without_idle_roles(values) == {"retain_loss": 1.0}


def test_a_stop_is_not_saved_but_reached_again():
  state = create_state({"params": {"w": jnp.ones(2)}}, (optax.sgd(0.1),), seed=0)
  stopped = loop._Position(state=state.replace(stop=jnp.int32(Stop.INFEASIBLE)), best={})
  wanted = loop._Position(state=state, best={}).arrays()
  jax.tree.map(np.testing.assert_array_equal, stopped.arrays(), wanted)
