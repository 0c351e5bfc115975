"""Tug-of-war against the golden numbers of both published forms and by hand."""

import numpy as np
import pytest

from hamu_jax.errors import UserError
from hamu_jax.metrics.tow import tug_of_war


def _accuracies(retain, forget, test):
  return {"retain": retain, "forget": forget, "test": test}


@pytest.mark.parametrize("signed, name", ((False, "absolute"), (True, "as_coded")))
def test_golden(golden, signed, name):
  with np.load(golden / "metrics.npz", allow_pickle=False) as arrays:
    percent, expected = arrays["tow/accuracies_and_retrain_refs"], arrays[f"tow/{name}"]
  has_reference = percent[:, 3] >= 0
  assert has_reference.sum() == 22
  for row, value in zip(percent[has_reference] / 100, expected[has_reference]):
    tow = tug_of_war(_accuracies(*row[:3]), _accuracies(*row[3:]), signed=signed)
    assert tow == pytest.approx(value, rel=1e-12)


def test_by_hand():
  unlearned, retrained = _accuracies(0.9, 0.3, 0.8), _accuracies(0.8, 0.1, 0.9)
  assert tug_of_war(unlearned, retrained) == pytest.approx(0.9 * 0.8 * 0.9)
  assert tug_of_war(unlearned, retrained, signed=True) == pytest.approx(1.1 * 0.8 * 0.9)


def test_limits():
  accuracies = _accuracies(0.9, 0.3, 0.8)
  assert tug_of_war(accuracies, accuracies) == 1.0
  assert tug_of_war(_accuracies(1.0, 1.0, 1.0), _accuracies(1.0, 0.0, 1.0)) == 0.0
  # Better than retrained in the signed reading.
  assert tug_of_war(_accuracies(1, 0, 1), _accuracies(0.9, 0.1, 0.9), signed=True) > 1


def test_other_splits_are_ignored():
  accuracies = _accuracies(0.9, 0.3, 0.8)
  assert tug_of_war(accuracies | {"test_forget": 7.0}, accuracies) == 1.0


@pytest.mark.parametrize("value", (-0.01, 1.01, 99.0, float("nan")))
def test_out_of_range(value):
  with pytest.raises(UserError, match=r"retrained forget accuracy is .*outside \[0, 1\].*percent"):
    tug_of_war(_accuracies(0.9, 0.3, 0.8), _accuracies(0.9, value, 0.8))


def test_missing_split():
  with pytest.raises(UserError, match="unlearned model has no test accuracy"):
    tug_of_war({"retain": 0.9, "forget": 0.1}, _accuracies(0.9, 0.3, 0.8))
