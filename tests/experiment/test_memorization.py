"""The ensemble behind the memorization scores: models trained together are those trained one by one."""

import contextlib
import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax import data
from hamu_jax.config import default as config_lib
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import loop as loop_lib
from hamu_jax.engine import methods, pairing, sub_step
from hamu_jax.engine import stage as stage_lib
from hamu_jax.engine.objectives import Outputs
from hamu_jax.errors import UserError
from hamu_jax.experiment import memorization
from hamu_jax.run import preemption, rundir
from hamu_jax.run import stage_cache as stages
from hamu_jax.transforms.stop import Stop
from hamu_jax.vision import evaluation, feed
from hamu_jax.vision import task as vision
from sam_jax.memorization import memorization_scores, subsample

SEED = 3
AVAILABLE = np.arange(3, 45, dtype=np.int32)
# Groups of 3, 3 and 2 models; subsets of 21 examples make batches of 8, 8 and 5.
MODELS, PARALLEL, BATCH, EPOCHS, STEPS = 8, 3, 8, 4, 12
GROUPS = [("memorization0", 0), ("memorization3", 0), ("memorization6", 0)]
RNG = np.random.default_rng(0)
DATA = feed.ImageData(
  RNG.integers(0, 256, (48, 2, 3, 1)).astype(np.uint8),
  RNG.integers(0, 3, 48).astype(np.int32),
  np.zeros(48, bool),
  np.arange(48, dtype=np.int32),
)


def linear(variables, batch, key, train):
  del key, train
  pixels = batch["image"].reshape(len(batch["label"]), -1).astype(jnp.float32) / 128 - 1
  params = variables["params"]
  return Outputs(pixels @ params["w"] + params["b"][None]), variables["batch_stats"]


def init(seed):
  return {
    "params": {"w": jax.random.normal(jax.random.key(seed), (6, 3)), "b": jnp.zeros(3)},
    "batch_stats": {},
  }


class Recorder(evaluation.Evaluator):
  """Keeps the params of all models that it evaluates."""

  seen = None

  def per_example(self, variables, *, members=False):
    self.seen.append(jax.device_get(variables["params"]))
    return super().per_example(variables, members=members)


# Their compiled programs serve all tests.
TRAIN = {"train": evaluation.Examples(DATA.images, DATA.labels, AVAILABLE)}
EVALUATOR = Recorder(linear, TRAIN, 16)


@pytest.fixture(scope="module")
def runner():
  with preemption.Watch() as watch:
    yield loop_lib.Loop(
      forward=linear,
      fetch=vision.make_fetch,
      feed=feed.ResidentImages(DATA),
      evaluate=None,
      pairing="sequential",
      devices=(),
      progress=None,
      watch=watch,
      checkpoint_seconds=1e9,
    )


class Estimate:
  """Estimates in one folder, and what was done for them.

  Attributes:
    trained: (stage, its first step) in order.
    evaluated: params of each group of models that was evaluated, in order.
  """

  def __init__(self, runner, folder):
    self._runner, self.folder = runner, folder
    self.options = config_lib.default_config().memorization
    # Flips are drawn with each model's own key.
    self.options.update(
      models=MODELS,
      parallel=PARALLEL,
      fraction=0.5,
      batch_size=BATCH,
      epochs=float(EPOCHS),
      augment="flip",
    )
    self.options.optimizer.update(name="sgd", learning_rate=0.3, momentum=0.9, schedule="cosine")
    self.inputs = {"model": "linear"}
    self.trained, self.evaluated, self._interrupt_at = [], [], None

  @property
  def models(self):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *self.evaluated)

  def loop(self, watch=None):
    estimate = self

    @contextlib.contextmanager
    def progress(stage, total, initial, **options):
      estimate.trained.append((stage, initial))

      class Bar:
        def phase(self, name):
          del name

        def update(self, step, values):
          if (stage, step) == estimate._interrupt_at:
            os.kill(os.getpid(), signal.SIGTERM)

      yield Bar()

    return dataclasses.replace(
      self._runner,
      progress=progress,
      watch=watch or self._runner.watch,
    )

  def run(self, watch=None, evaluator=EVALUATOR):
    evaluator.seen = self.evaluated
    return memorization.estimate(
      self.options,
      AVAILABLE,
      self.inputs,
      seed=SEED,
      init=init,
      loop=self.loop(watch),
      evaluator=evaluator,
      cache=stages.StageCache(self.folder / "stages"),
      rundir=rundir.RunDir(self.folder),
    )

  def interrupted(self, stage, step):
    """Asks the run to end after a step."""
    self._interrupt_at = stage, step
    with preemption.Watch() as watch, pytest.raises(preemption.Preempted):
      self.run(watch)
    self._interrupt_at = None
    self.trained.clear()
    self.evaluated.clear()


@pytest.fixture
def estimate(runner, tmp_path):
  (tmp_path / "estimate").mkdir()
  return Estimate(runner, tmp_path / "estimate")


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory):
  """An estimate that nothing disturbed, and its scores."""
  estimate = Estimate(runner, tmp_path_factory.mktemp("whole"))
  return estimate, estimate.run()


def test_models_trained_together_are_those_trained_one_by_one(whole, estimate):
  together, result = whole
  assert together.trained == GROUPS
  included = subsample(len(AVAILABLE), MODELS, 0.5, SEED)
  logits = []
  pixels = DATA.images[AVAILABLE].reshape(len(AVAILABLE), -1) / 128 - 1
  for k in range(MODELS):
    plan = data.training_plan(AVAILABLE[included[k]], batch_size=BATCH, seed=SEED + k)
    stage = stage_lib.Stage(
      f"alone{k}",
      methods.TRAINING,
      estimate.options,
      plan,
      hyperparameters_of(estimate.options),
      STEPS,
      SEED + k,
      train=True,
      training_mode=True,
    )
    member = stage_lib.Member(stage, init(SEED + k), sub_step.Frozen(), rundir.RunDir(estimate.folder))
    (outcome,) = estimate.loop().run([member], estimate.folder / f"{k}")
    params = outcome.variables["params"]
    jax.tree.map(
      lambda leaf, alone, k=k: np.testing.assert_allclose(leaf[k], alone, rtol=1e-5, atol=1e-5),
      together.models,
      params,
    )
    logits.append(pixels @ np.asarray(params["w"]) + np.asarray(params["b"]))
  logits = np.array(logits)
  # No prediction hangs on rounding.
  best, second = np.sort(logits, 2)[..., :-3:-1].transpose(2, 0, 1)
  assert (best - second).min() > 1e-4
  correct = logits.argmax(2) == DATA.labels[AVAILABLE]
  np.testing.assert_array_equal(result.correct, correct)
  np.testing.assert_array_equal(result.included, included)
  np.testing.assert_allclose(result.scores, memorization_scores(correct, included), atol=1e-12)
  assert len(np.unique(result.scores)) > 9 and result.scores.max() > 0.5


def test_scores_do_not_depend_on_how_many_models_are_trained_at_once(whole, estimate):
  together, result = whole
  estimate.options.parallel = 2
  np.testing.assert_array_equal(estimate.run().scores, result.scores)
  assert len(estimate.trained) == 4
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5),
    estimate.models,
    together.models,
  )


class Trained(Exception):
  """Instead of training: the name of the first group that would be."""


@pytest.fixture
def untrainable(monkeypatch):
  def run(loop, members, path):
    raise Trained(members[0].stage.name)

  monkeypatch.setattr(loop_lib.Loop, "run", run)


def test_finished_models_are_reused_and_an_ensemble_can_grow(whole, estimate, untrainable):
  estimate.folder = whole[0].folder
  estimate.options.parallel = 1
  again = estimate.run()
  jax.tree.map(np.testing.assert_array_equal, again, whole[1])
  estimate.options.models = 11
  with pytest.raises(Trained, match=f"memorization{MODELS}"):
    estimate.run()


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("epochs", 5.0),
    ("batch_size", 9),
    ("augment", "none"),
    ("fraction", 0.55),
    ("clip_norm", 1.0),
    ("optimizer", config_lib.optimizer_config("sgd", 0.2)),
    ("model", "another"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_is_keyed_by_what_it_depends_on(whole, estimate, untrainable, field, value):
  estimate.folder = whole[0].folder
  (estimate.options if field in estimate.options else estimate.inputs)[field] = value
  with pytest.raises(Trained, match="memorization0"):
    estimate.run()


def test_an_interrupted_estimate_goes_on_where_it_was(whole, estimate):
  together, result = whole
  estimate.interrupted("memorization3", 2)
  assert len(list((estimate.folder / "stages").glob("memorization-*"))) == PARALLEL
  # As under pmap, whose devices share an evaluation.
  several = Recorder(linear, TRAIN, 16, pairing.make_mesh(jax.devices(), 1))
  again = estimate.run(evaluator=several)
  np.testing.assert_array_equal(again.correct, result.correct)
  np.testing.assert_array_equal(again.scores, result.scores)
  # The first group is there, the second goes on from the last step, and nothing is lost or repeated.
  assert estimate.trained == [("memorization3", 2), ("memorization6", 0)]
  jax.tree.map(
    lambda later, all_: np.testing.assert_array_equal(later, all_[PARALLEL:]),
    estimate.models,
    together.models,
  )
  for stage, _ in GROUPS:
    rows = [row for row in rundir.read_metrics(estimate.folder).rows if row["stage"] == stage]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))


def test_groups_of_another_size_go_on_with_the_models_that_are_not_finished(whole, estimate):
  together, result = whole
  estimate.interrupted("memorization3", 2)
  estimate.options.parallel = 2
  np.testing.assert_array_equal(estimate.run().scores, result.scores)
  # Models 3 to 7; nothing of the abandoned group is used.
  assert estimate.trained == [("memorization3", 0), ("memorization5", 0), ("memorization7", 0)]
  jax.tree.map(
    lambda later, all_: np.testing.assert_allclose(later, all_[PARALLEL:], rtol=1e-5, atol=1e-5),
    estimate.models,
    together.models,
  )


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("models", 3, r"models=3: \d+ of 42 examples are in no training subset .* train more than 3 models"),
    ("fraction", 0.01, r"fraction=0.01: subsets of 0.01 of 42 examples: .* takes at least one example"),
    ("fraction", 0.999, r"fraction=0.999: .* and leaves one$"),
    ("batch_size", 22, r"batch_size=22: a model sees 21 of 42 examples, so choose 1\.\.21$"),
  ],
)
def test_what_cannot_give_scores_is_refused_before_anything_is_trained(estimate, field, value, message):
  estimate.options[field] = value
  with pytest.raises(UserError, match=f"^config.memorization.{message}") as error:
    estimate.run()
  assert "\n" not in str(error.value)
  assert not estimate.trained


def test_an_ensemble_that_diverges_is_one_clear_line(estimate, monkeypatch):
  outcome = stage_lib.Outcome({}, 7, Stop.NONFINITE, {}, {}, 1.0)
  monkeypatch.setattr(loop_lib.Loop, "run", lambda *arguments: [outcome])
  with pytest.raises(UserError, match="not finite after 7 steps; lower config.memorization.optimizer"):
    estimate.run()
  assert not (estimate.folder / "stages").exists()


def test_streamed_windows_hold_the_rows_of_all_models():
  """More examples than a chunk has steps and models."""
  count = 4000
  images = (np.arange(count) % 251).astype(np.uint8).reshape(count, 1, 1, 1)
  indices = np.arange(count, dtype=np.int32)
  plan, _ = data.join_plans(
    [
      data.training_plan(indices[included], batch_size=100, seed=SEED)
      for included in subsample(count, 2, 0.5, SEED)
    ]
  )
  streamed = feed.StreamedImages(feed.ImageData(images, indices, np.zeros(count, bool), indices))
  arrays, batches = streamed.chunk(plan, 0, 10, None)
  wanted = plan.indices(0, 10).retain
  assert len(np.unique(wanted)) > 2 * chunk_lib.CHUNK_CAPACITY
  local = np.asarray(batches.indices.retain[:10])
  np.testing.assert_array_equal(np.asarray(arrays.ids)[local], wanted)
  np.testing.assert_array_equal(np.asarray(arrays.images)[local], images[wanted])
