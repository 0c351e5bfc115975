"""The loop around the step: best epoch, boundaries, placing."""

import contextlib
import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax import data
from hamu_jax.config import default as config_lib
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.engine import loop, methods, step_log, sub_step
from hamu_jax.engine import stage as stage_lib
from hamu_jax.engine.objectives import Outputs
from hamu_jax.engine.position import Track
from hamu_jax.paired import Paired
from hamu_jax.run import preemption, rundir
from hamu_jax.transforms.stop import Stop
from hamu_jax.vision import evaluation, feed


def forward(variables, batch, key, train):
  del key, train
  return Outputs(batch["image"] @ variables["params"]["w"]), variables["batch_stats"]


def fetch(augment):
  del augment

  def take(arrays, indices, key):
    del key
    return data.take(arrays.images, arrays.labels, indices)

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
      "retain": {"accuracy": accuracy},
      "forget": {"accuracy": 0.0},
      "test": {"accuracy": 0.0},
      "retain_forget_auc": 0.5,
      "forget_test_auc": 0.5,
    }


@contextlib.contextmanager
def silent(stage, total, initial, **options):
  class Bar:
    def phase(self, name):
      del name

    def update(self, step, values):
      pass

  yield Bar()


@pytest.fixture
def setup(tmp_path):
  rng = np.random.default_rng(0)
  arrays = feed.ImageData(
    rng.normal(size=(32, 4)).astype(np.float32),
    rng.integers(0, 3, 32).astype(np.int32),
    np.zeros(32, bool),
    np.arange(32),
  )
  options = config_lib.default_config().train
  options.update(batch_size=8, epochs=4, evaluate_epochs=1.0)
  options.optimizer = config_lib.optimizer_config("sgd", 0.1)

  def run(accuracies, **overrides):
    options.update(overrides)
    evaluator = Scripted(accuracies)
    with preemption.Watch() as watch:
      runner = loop.Loop(
        forward=forward,
        fetch=fetch,
        feed=feed.ResidentImages(arrays),
        evaluate=evaluator.summary,
        pairing="sequential",
        devices=(),
        progress=silent,
        watch=watch,
        checkpoint_seconds=1e9,
      )
      plan = data.training_plan(np.arange(32), batch_size=8, seed=0)
      best = evaluation.selection_score if options.select == "best" else None
      stage = stage_lib.Stage(
        "pretrain",
        methods.TRAINING,
        options,
        plan,
        hyperparameters_of(options),
        16,
        0,
        train=True,
        training_mode=True,
        best=best,
      )
      variables = {"params": {"w": jnp.zeros((4, 3))}, "batch_stats": {}}
      member = stage_lib.Member(stage, variables, sub_step.Frozen(), rundir.RunDir(tmp_path))
      (outcome,) = runner.run([member], tmp_path / "checkpoints")
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
  assert step_log._without_idle_roles(values) == {"retain_loss": 1.0}


class Together:
  """Three members of one stage: two seeds, and a threshold that one of them soon crosses."""

  def __init__(self, folder, keep_every=0):
    self._folder, self._keep_every = folder, keep_every
    rng = np.random.default_rng(1)
    features = rng.normal(size=(32, 4)).astype(np.float32)
    self._feed = feed.ResidentImages(
      feed.ImageData(
        features,
        (features @ rng.normal(size=(4, 3))).argmax(1).astype(np.int32),
        np.arange(32) >= 24,
        np.arange(32),
      )
    )
    self._evaluate = lambda variables: {
      "retain": {"accuracy": float(variables["params"]["w"].mean())},
      "forget": {"loss": float(variables["params"]["w"].std())},
    }

  def member(self, number):
    options = config_lib.default_config().method
    options.update(batch_size=8, epochs=4.0, evaluate_epochs=1.0, stop_on_loss=True, min_forget_loss=0.0)
    options.update(max_retain_loss=(9.0, 1.3, 9.0)[number])
    options.optimizer = config_lib.optimizer_config("sgd", (0.5, 1.0, 0.5)[number])
    seed = (0, 0, 5)[number]
    split = Paired(np.arange(24, dtype=np.int32), np.arange(24, 32, dtype=np.int32))
    plan = data.unlearning_plan(split, "paired", batch_size=8, seed=seed)
    stage = stage_lib.Stage(
      "unlearn",
      methods.METHODS["gdiff"],
      options,
      plan,
      hyperparameters_of(options),
      12,
      seed,
      keep_every=self._keep_every,
    )
    start = 0.1 * jax.random.normal(jax.random.key(seed), (4, 3))
    path = self._folder / f"run{number}"
    path.mkdir(parents=True, exist_ok=True)
    return stage_lib.Member(
      stage, {"params": {"w": start}, "batch_stats": {}}, sub_step.Frozen(), rundir.RunDir(path)
    )

  def run(self, numbers, interrupt_at=None):
    """-> outcomes, metric rows of each run directory."""

    @contextlib.contextmanager
    def progress(stage, total, initial, **options):
      class Bar:
        def phase(self, name):
          del name

        def update(self, step, values):
          if step == interrupt_at:
            os.kill(os.getpid(), signal.SIGTERM)

      yield Bar()

    members = [self.member(number) for number in numbers]
    with preemption.Watch() as watch:
      runner = loop.Loop(
        forward=forward,
        fetch=fetch,
        feed=self._feed,
        evaluate=self._evaluate,
        pairing="sequential",
        devices=(),
        progress=progress,
        watch=watch,
        checkpoint_seconds=1e9,
        save=lambda folder, name, variables: np.save(folder / name, variables["params"]["w"]),
      )
      name = "-".join(map(str, numbers))
      outcomes = runner.run(members, self._folder / "checkpoints" / name)
    return outcomes, [rundir.read_metrics(member.rundir.path).rows for member in members]

  def kept(self, number):
    """-> {file name: weights}."""
    return {path.name: np.load(path) for path in (self._folder / f"run{number}" / loop.KEPT).glob("*")}


def assert_alike(found, wanted, **tolerance):
  """Compares outcomes and metric rows, up to a tolerance or exactly."""
  compare = np.testing.assert_equal
  if tolerance:
    compare = functools.partial(np.testing.assert_allclose, **tolerance)
  for outcomes in zip(found[0], wanted[0], strict=True):
    jax.tree.map(compare, *map(plain, outcomes))
  for rows, others in zip(found[1], wanted[1], strict=True):
    assert [(row["step"], row["split"]) for row in rows] == [
      (index["step"], index["split"]) for index in others
    ]
    jax.tree.map(compare, *([drop_words(row) for row in log] for log in (rows, others)))


def plain(outcome):
  """On the host, the metrics as JSON values, and without the time."""
  metrics = rundir.jsonable(outcome.last_metrics)
  return jax.device_get(outcome._replace(seconds=0.0, timing={}, last_metrics=metrics))


def drop_words(index):
  return {name: value for name, value in index.items() if not isinstance(value, str)}


@pytest.mark.parametrize("numbers", [(0, 1), (0, 1, 2)])
def test_members_trained_together_end_as_they_do_alone(tmp_path, numbers):
  together = Together(tmp_path / "together").run(numbers)
  assert [outcome.stop for outcome in together[0]][:2] == [Stop.NONE, Stop.RETAIN_LOSS]
  assert 0 < together[0][1].steps < together[0][0].steps == 12
  alone = [Together(tmp_path / "alone").run((number,)) for number in numbers]
  alone = [outcomes[0] for outcomes, _ in alone], [rows[0] for _, rows in alone]
  assert_alike(together, alone, rtol=2e-5, atol=1e-6)


def test_interrupted_members_go_on_where_they_were(tmp_path):
  wanted = Together(tmp_path / "whole").run((0, 1, 2))
  # One has stopped by then.
  assert wanted[0][1].steps < 9
  interrupted = Together(tmp_path / "interrupted")
  with pytest.raises(preemption.Preempted):
    interrupted.run((0, 1, 2), interrupt_at=9)
  assert_alike(interrupted.run((0, 1, 2)), wanted)


def test_a_run_interrupted_by_its_stop_ends_with_it(tmp_path):
  wanted = Together(tmp_path / "whole").run((1,))
  interrupted = Together(tmp_path / "interrupted")
  with pytest.raises(preemption.Preempted):
    interrupted.run((1,), interrupt_at=wanted[0][0].steps)
  assert_alike(interrupted.run((1,)), wanted)


def test_members_of_one_run_directory_log_their_means(tmp_path):
  member = Together(tmp_path).member(0)
  tracks = [Track({}), Track({})]
  metrics = {
    "retain_loss": np.array([[1.0, 2.0, 9.0], [2.0, 4.0, 9.0]]),
    "stop": np.array([[0, 0, 0], [0, Stop.NONFINITE, 0]]),
  }
  step_log.log([member, member], tracks, [4, 4], metrics, np.array([3, 2]))
  rows = rundir.read_metrics(member.rundir.path).rows
  assert [row["step"] for row in rows] == [5, 6]
  assert [row["retain_loss"] for row in rows] == [1.5, 3.0]
  assert [row["applied"] for row in rows] == [True, False]


def test_models_are_kept_every_few_steps_also_by_a_resumed_run(tmp_path):
  # Evaluated every 3 steps; member 1 stops on its own.
  whole, interrupted = (Together(tmp_path / name, keep_every=2) for name in ("whole", "interrupted"))
  outcomes, rows = whole.run((0, 1))
  with pytest.raises(preemption.Preempted):
    interrupted.run((0, 1), interrupt_at=8)
  assert max(interrupted.kept(0)) == "unlearn-000008.npy"
  interrupted.run((0, 1))
  for number, outcome in enumerate(outcomes):
    kept = whole.kept(number)
    assert set(kept) == {f"unlearn-{step:06}.npy" for step in range(2, outcome.steps + 1, 2)}
    np.testing.assert_equal(interrupted.kept(number), kept)
  assert 0 < len(whole.kept(1)) < 6
  # What is kept after step 6 is what is evaluated after step 6; keeping changes no result.
  (evaluated,) = (row for row in rows[0] if row["step"] == 6 and row["split"] == "retain")
  assert evaluated["accuracy"] == pytest.approx(float(whole.kept(0)["unlearn-000006.npy"].mean()), rel=1e-6)
  plain_run = Together(tmp_path / "plain")
  assert_alike((outcomes, rows), plain_run.run((0, 1)))
  assert not plain_run.kept(0)
