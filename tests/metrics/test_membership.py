"""The loss AUC against brute force, scikit-learn and the reference's golden numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from hamu_jax.errors import UserError
from hamu_jax.metrics.membership import loss_auc

# Few distinct values, so that ties within and across the sets are common.
losses = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 3.0, np.inf]), min_size=1, max_size=12)


@given(losses, losses)
def test_brute_force(negatives, positives):
  wins = sum((n < p) + 0.5 * (n == p) for n in negatives for p in positives)
  assert loss_auc(negatives, positives) == wins / (len(negatives) * len(positives))


@pytest.mark.parametrize("decimals", (2, 12))
def test_sklearn(decimals):
  rng = np.random.default_rng(decimals)
  negatives = rng.exponential(size=501).round(decimals)
  positives = (rng.exponential(size=97) + 0.2).round(decimals)
  labels = np.repeat([0, 1], [501, 97])
  expected = roc_auc_score(labels, np.concatenate([negatives, positives]))
  assert loss_auc(negatives, positives) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", (0, 1))
@pytest.mark.parametrize("first, second", (("retain", "forget"), ("forget", "test")))
def test_golden(golden, case, first, second):
  with np.load(golden / "metrics.npz", allow_pickle=False) as arrays:
    prefix = f"vision_metrics/{case}/eval_"
    auc = loss_auc(arrays[f"{prefix}{first}_mean_losses"], arrays[f"{prefix}{second}_mean_losses"])
    assert auc == pytest.approx(float(arrays[f"{prefix}{first}_{second}_losses_auc"]), rel=1e-12)


def test_higher_loss_marks_the_second_set():
  assert loss_auc([0.1, 0.2], [0.3, 0.4]) == 1.0
  assert loss_auc([0.3, 0.4], [0.1, 0.2]) == 0.0
  assert loss_auc([1.0], [1.0]) == 0.5


def test_counts_beyond_int32_are_exact():
  """70,000 squared overflows 32 bits."""
  size = 70_000
  assert loss_auc(np.zeros(size), np.ones(size, np.float32)) == 1.0


def test_nan_has_no_rank():
  assert np.isnan(loss_auc([0.0, np.nan], [1.0]))
  assert np.isnan(loss_auc([0.0], [np.nan]))


@pytest.mark.parametrize(
    "negatives, positives, name", (([], [1.0], "first"), ([1.0], [], "second")))
def test_empty_set(negatives, positives, name):
  with pytest.raises(UserError, match=f"the {name} set has no examples"):
    loss_auc(negatives, positives)
