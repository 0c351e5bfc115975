"""Threshold attacks: the sharpness paper's numbers, a search by hand, and sets that nothing separates."""

import numpy as np
import pytest

from hamu_jax.errors import UserError
from hamu_jax.metrics import membership
from hamu_jax.metrics.threshold_mia import threshold_mia


@pytest.fixture
def sets(golden):
  """-> function: (probabilities, labels) of a set of the reference."""
  with np.load(golden / "sam" / "evaluation.npz", allow_pickle=False) as arrays:
    yield lambda name: (arrays[f"svc/{name}_prob"], arrays[f"svc/{name}_labels"])


@pytest.mark.parametrize("name", ["correctness", "confidence", "entropy"])
def test_the_references_accuracies(sets, golden, name):
  with np.load(golden / "sam" / "evaluation.npz", allow_pickle=False) as arrays:
    members, others = arrays[f"threshold_mia/{name}"]
  known = (*sets("shadow_train"), *sets("shadow_test"))
  assert 1 - threshold_mia(*known, *sets("target_train"))[name] == pytest.approx(members)
  assert threshold_mia(*known, *sets("target_test"))[name] == pytest.approx(others)


def test_modified_entropy_by_search(sets):
  """The reference computes another entropy, so this is the definition, one threshold after the other."""
  score = lambda probs, labels: -membership.modified_entropy(probs, labels)
  (retain, test, forget) = map(sets, ("shadow_train", "shadow_test", "target_test"))
  called = 0
  for label in range(10):
    known, unknown, judged = (score(*each)[each[1] == label] for each in (retain, test, forget))
    best, threshold = -1.0, None
    for value in (*known, *unknown):
      if (quality := np.mean(known >= value) + np.mean(unknown < value)) > best:
        best, threshold = quality, value
    called += np.sum(judged < threshold)
  found = threshold_mia(*retain, *test, *forget)["modified_entropy"]
  assert found == pytest.approx(called / len(forget[1]))


def test_separable_and_missing_classes():
  sure, unsure = np.array([[0.9, 0.1]] * 3), np.array([[0.6, 0.4]] * 3)
  zeros = np.zeros(3, int)
  assert set(threshold_mia(sure, zeros, unsure, zeros, unsure, zeros).values()) == {0.0, 1.0}
  assert threshold_mia(sure, zeros, unsure, zeros, unsure, zeros)["confidence"] == 1
  assert threshold_mia(sure, zeros, unsure, zeros, sure, zeros)["confidence"] == 0
  # No example of class 1 to learn from.
  assert threshold_mia(sure, zeros, unsure, zeros, unsure[:, ::-1], zeros + 1)["confidence"] == 0
  broken = np.full((3, 2), np.nan)
  assert all(np.isnan(value) for value in threshold_mia(sure, zeros, unsure, zeros, broken, zeros).values())
  with pytest.raises(UserError, match="different numbers of classes"):
    threshold_mia(sure, zeros, unsure, zeros, np.full((3, 3), 1 / 3), zeros)
