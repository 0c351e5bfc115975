"""Features and their entanglement, against NumPy."""

import numpy as np
import pytest

from hamu_jax.analysis import examples as examples_lib
from hamu_jax.analysis import features as features_lib
from hamu_jax.paired import Paired
from sam_jax import entanglement
from tests.analysis import perceptrons


def test_features_are_the_classifiers_inputs(make_run):
  run = examples_lib.load_run(make_run(), max_examples=1000, seed=0)
  variables = {"a": perceptrons.variables(0), "b": perceptrons.variables(1)}
  # More than one microbatch of 256, and one that is not full.
  features = features_lib.extract_features(run, variables)
  for name, sets in features.items():
    for role, got in sets._asdict().items():
      expected, _ = perceptrons.forward(variables[name], getattr(run.examples, role))
      np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_measures_are_global_and_class_wise():
  rng = np.random.default_rng(0)
  features = Paired(rng.normal(size=(60, 5)), rng.normal(size=(40, 5)))
  examples = Paired(
    *(examples_lib.Examples(None, np.arange(size) % classes) for size, classes in ((60, 3), (40, 2)))
  )
  report = features_lib.measure(features, examples, seed=4)
  labels = {"retain_labels": examples.retain.labels, "forget_labels": examples.forget.labels}
  assert report["global"]["variance_ratio"] == entanglement.variance_entanglement(*features)
  assert report["class_wise"]["variance"] == pytest.approx(
    entanglement.variance_entanglement(*features, **labels) / 1300
  )
  for name in ("wasserstein", "silhouette", "knn"):
    function = getattr(entanglement, f"{name}_entanglement")
    assert report["global"][name] == function(*features)
    assert report["class_wise"][name] == function(*features, **labels)


def test_measures_that_a_split_has_not_are_none():
  """A whole class is forgotten, and of few examples: no class-wise measure, no ten neighbours."""
  rng = np.random.default_rng(0)
  features = Paired(rng.normal(size=(20, 3)), rng.normal(size=(6, 3)))
  examples = Paired(
    examples_lib.Examples(None, np.arange(20) % 3), examples_lib.Examples(None, np.full(6, 7))
  )
  report = features_lib.measure(features, examples, seed=0)
  assert set(report["class_wise"].values()) == {None}
  assert [name for name, value in report["global"].items() if value is None] == ["knn"]
