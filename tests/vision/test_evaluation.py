"""Evaluation by split against NumPy, whatever the batches and devices."""

import jax
import numpy as np
import pytest
import scipy.special
from sklearn.metrics import roc_auc_score

from hamu_jax.engine import pairing
from hamu_jax.engine.objectives import Outputs
from hamu_jax.vision import evaluation


def forward(variables, batch, key, train):
  assert not train
  images = batch["image"].reshape(len(batch["label"]), -1).astype(np.float32) / 255
  return Outputs(images @ variables), {}


@pytest.fixture
def evaluated():
  rng = np.random.default_rng(0)
  sizes = {"retain": 23, "forget": 8, "test": 11}
  splits = {
    # Every other example of a larger split.
    name: evaluation.Examples(
      rng.integers(0, 256, (2 * size, 2, 2, 1)).astype(np.uint8),
      rng.integers(0, 3, 2 * size).astype(np.int32),
      np.arange(0, 2 * size, 2),
    )
    for name, size in sizes.items()
  }
  return splits, rng.normal(size=(4, 3)).astype(np.float32)


@pytest.mark.parametrize("devices", [None, 3])
@pytest.mark.parametrize("batch_size", [5, 8, 100])
def test_means_and_aucs_are_those_of_all_examples(evaluated, batch_size, devices):
  splits, weights = evaluated
  mesh = devices and pairing.make_mesh(jax.devices()[:devices], 1)
  evaluator = evaluation.Evaluator(forward, splits, batch_size, mesh)
  summary = evaluator.summary(jax.device_put(weights))
  losses = {}
  for name, examples in splits.items():
    images, labels = examples.images[::2], examples.labels[::2]
    log_p = scipy.special.log_softmax(images.reshape(len(labels), -1) / 255 @ weights, axis=1)
    losses[name] = -log_p[np.arange(len(labels)), labels]
    wanted = {
      "loss": losses[name].mean(),
      "accuracy": (log_p.argmax(axis=1) == labels).mean(),
      "entropy": scipy.special.entr(np.exp(log_p)).sum(axis=1).mean(),
      "count": len(labels),
    }
    assert summary[name].keys() == wanted.keys()
    for key, value in wanted.items():
      np.testing.assert_allclose(summary[name][key], value, rtol=1e-5)
  for first, second in (("retain", "forget"), ("forget", "test")):
    membership = np.repeat([0, 1], [len(losses[first]), len(losses[second])])
    wanted = roc_auc_score(membership, np.concatenate([losses[first], losses[second]]))
    np.testing.assert_allclose(summary[f"{first}_{second}_auc"], wanted, rtol=1e-6)


def test_all_splits_share_one_compilation(evaluated):
  splits, weights = evaluated
  evaluator = evaluation.Evaluator(forward, splits, 5)
  for _ in range(2):
    evaluator.summary(weights)
  assert evaluator._evaluate_batch._cache_size() == 1


def test_the_members_of_an_ensemble_are_evaluated_apart(evaluated):
  splits, weights = evaluated
  evaluator = evaluation.Evaluator(forward, splits, 8)
  both = evaluator.per_example(np.stack([weights, -weights]), members=True)
  for member, own in enumerate((weights, -weights)):
    wanted = evaluator.per_example(own)
    for name in splits:
      np.testing.assert_allclose(both[name]["loss"][member], wanted[name]["loss"], rtol=1e-5)


def test_a_validation_split_selects_by_itself():
  summary = {name: {"accuracy": 0.0} for name in ("retain", "forget", "test")}
  assert evaluation.selection_score(summary | {"validation": {"accuracy": 0.8}}) == 0.8


def test_selection_score_is_the_mean_of_both_accuracies():
  summary = {"retain": {"accuracy": 0.9}, "forget": {"accuracy": 0.5}, "test": {"accuracy": 0.0}}
  assert evaluation.selection_score(summary) == pytest.approx(0.7)
