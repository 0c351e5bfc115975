"""Membership inference against brute force, scikit-learn and the references' golden numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score

from hamu_jax.errors import UserError
from hamu_jax.metrics import membership
from hamu_jax.metrics.membership import loss_auc, min_k, min_k_auc, min_k_plus_plus, svc_mia, zlib_ratio

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


@pytest.mark.parametrize("negatives, positives, name", (([], [1.0], "first"), ([1.0], [], "second")))
def test_empty_set(negatives, positives, name):
  with pytest.raises(UserError, match=f"the {name} set has no examples"):
    loss_auc(negatives, positives)


# Texts


@pytest.fixture(params=(0, 1))
def texts(request, golden):
  """-> function: an array of one of HAMU's evaluations by its name."""
  with np.load(golden / "tofu" / "min_k.npz", allow_pickle=False) as arrays:
    yield lambda name: arrays[f"{request.param}/{name}"]


def _answers(texts, name):
  """Log-probabilities of a set's tokens, each predicted at the position before it, and a mask."""
  labels = texts(f"{name}_labels")[:, 1:].astype(int)
  log_probs = log_softmax(texts(f"{name}_logits")[:, :-1].astype(np.float64), axis=-1)
  mask = labels != -100
  return np.take_along_axis(log_probs, np.where(mask, labels, 0)[..., None], -1)[..., 0], mask


@pytest.mark.parametrize("name", ("retain", "forget", "test"))
def test_min_k_is_hamus(texts, name):
  scores = min_k(*_answers(texts, name), fraction=float(texts("fraction")))
  np.testing.assert_allclose(scores, texts(f"eval_{name}_min_k_logprobs"), rtol=1e-12)


@pytest.mark.parametrize("name", ("retain", "forget", "test"))
def test_min_k_of_all_tokens_is_minus_the_loss(texts, name):
  scores = min_k(*_answers(texts, name), fraction=1)
  np.testing.assert_allclose(scores, -texts(f"eval_{name}_mean_losses"), rtol=1e-12)


@pytest.mark.parametrize("members, others", (("retain", "forget"), ("forget", "test")))
def test_min_k_auc_is_hamus(texts, members, others):
  (negatives, negatives_mask), (positives, positives_mask) = (
    _answers(texts, name) for name in (others, members)
  )
  auc = min_k_auc(
    negatives,
    positives,
    negatives_mask=negatives_mask,
    positives_mask=positives_mask,
    fraction=float(texts("fraction")),
  )
  assert auc == pytest.approx(float(texts(f"eval_{members}_{others}_min_k_logprobs_auc")), rel=1e-12)


def test_higher_min_k_marks_the_second_set():
  assert min_k_auc([[-3.0, -0.1], [-2.0, -0.1]], [[-1.0, -1.0, -1.0]]) == 1


def test_min_k_counts_tokens():
  """Of 30 tokens a tenth is 3, of 29 it is 2, of 5 it is still 1."""
  log_probs = -np.arange(30.0)
  for tokens, expected in ((30, -28.0), (29, -27.5), (5, -4.0)):
    assert min_k(log_probs[None, :tokens]) == expected


@given(
  st.lists(st.lists(st.floats(-20, 0), min_size=1, max_size=9), min_size=1, max_size=4),
  st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -99.0]),
  st.sampled_from([0.1, 0.4, 1.0]),
)
def test_padding_is_ignored(rows, padding, fraction):
  width = max(map(len, rows)) + 1
  padded = np.array([row + [padding] * (width - len(row)) for row in rows])
  mask = np.arange(width) < np.array([[len(row)] for row in rows])
  alone = np.concatenate([min_k([row], fraction=fraction) for row in rows])
  np.testing.assert_allclose(min_k(padded, mask, fraction=fraction), alone, rtol=1e-12)
  # Mean 0 and deviation 1 standardise nothing, also where padding holds no number.
  moments = np.where(mask, 0, padding), np.where(mask, 1, padding)
  np.testing.assert_allclose(min_k_plus_plus(padded, *moments, mask, fraction=fraction), alone, rtol=1e-12)


def test_token_that_is_nan_gives_nan():
  """Also where it would not be among the lowest."""
  log_probs = np.array([[-5.0, np.nan, -1.0], [-5.0, -2.0, -1.0]])
  for scores in (min_k(log_probs), min_k_plus_plus(log_probs, np.zeros((2, 3)), np.ones((2, 3)))):
    np.testing.assert_array_equal(np.isnan(scores), [True, False])
  assert min_k([[-np.inf, -1.0]]) == -np.inf


def test_min_k_plus_plus_by_hand():
  """Of probabilities 1/2, 1/4, 1/4: mean -3/2 log 2, deviation 1/2 log 2, so 1 and -1."""
  log_probs = -np.log(2) * np.array([[1.0, 2.0], [1.0, 1.0]])
  means, deviations = np.full((2, 2), -1.5 * np.log(2)), np.full((2, 2), 0.5 * np.log(2))
  np.testing.assert_allclose(min_k_plus_plus(log_probs, means, deviations, fraction=0.5), [-1, 1], rtol=1e-12)
  np.testing.assert_allclose(
    min_k_plus_plus(log_probs, means, deviations, fraction=1), [0, 1], rtol=1e-12, atol=1e-12
  )


@pytest.mark.filterwarnings("error")
def test_min_k_plus_plus_without_deviation():
  """A certain position, a uniform one with float32's rounding, and a token ruled out."""
  scores = min_k_plus_plus(
    [[0.0], [-np.log(1000) - 1e-6], [-np.inf]], [[0.0], [-np.log(1000)], [0.0]], np.zeros((3, 1))
  )
  np.testing.assert_allclose(scores, [0, 0, -np.inf], atol=2e-3)


def test_zlib_ratio_by_hand():
  """RFC 1950 and 1951: six bytes, and of bits 3, 7 and per character 8 (below 144) or 9."""
  ratios = zlib_ratio([8.0, 18.0, 5.0], ["", "a", "é"])
  np.testing.assert_allclose(ratios, [8 / (6 + 2), 18 / (6 + 3), 5 / (6 + 4)])
  # As many characters tell more if they do not repeat.
  repeated, varied = zlib_ratio([1.0, 1.0], ["a" * 64, "".join(map(chr, range(32, 96)))])
  assert repeated > 3 * varied


@pytest.mark.parametrize(
  "call, message",
  (
    (lambda: min_k([-1.0]), r"log-probabilities have shape \(1,\)"),
    (lambda: min_k([[-1.0]], [[1, 1]]), r"shape \(1, 1\) and their mask \(1, 2\)"),
    (lambda: min_k(np.zeros((3, 2)), [[1, 0], [0, 0], [0, 0]]), "2 of 3 texts .* first at row 1"),
    (lambda: min_k([[-1.0]], fraction=0), "fraction is 0; give"),
    (lambda: min_k([[-1.0]], fraction=10), "fraction is 10; give"),
    (lambda: min_k_auc(np.zeros((0, 2)), [[-1.0]]), "the first set has no examples"),
    (lambda: min_k_plus_plus([[-1.0]], [0.0], [[1.0]]), r"means have shape \(1,\)"),
    (lambda: min_k_plus_plus([[-1.0]], [[0.0]], [[1.0, 1.0]]), r"deviations have shape \(1, 2\)"),
    (lambda: min_k_plus_plus([[-1.0]], [[0.0]], [[-2.0]]), "deviations go down to -2"),
    (lambda: zlib_ratio([1.0], ["a", "b"]), r"losses have shape \(1,\) for 2 texts"),
    (lambda: zlib_ratio([1.0], "a"), "for one text; give"),
  ),
)
def test_texts_that_do_not_fit(call, message):
  with pytest.raises(UserError, match=message) as error:
    call()
  assert "\n" not in str(error.value)


# Support vector machines

FEATURES = ("correctness", "confidence", "entropy", "modified_entropy", "probability")


@pytest.fixture
def svc(golden):
  """-> function: what is stored under `svc/NAME`."""
  with np.load(golden / "sam" / "evaluation.npz", allow_pickle=False) as arrays:
    yield lambda name: arrays[f"svc/{name}"]


def _sets(svc):
  """Arguments of `svc_mia`: the reference calls retain, test and forget by other names."""
  return [
    svc(f"{name}_{kind}")
    for name in ("shadow_train", "shadow_test", "target_test")
    for kind in ("prob", "labels")
  ]


@pytest.mark.parametrize("name", ("shadow_train", "shadow_test", "target_train", "target_test"))
def test_features_are_the_references(svc, name):
  probs, labels = svc(f"{name}_prob"), svc(f"{name}_labels")
  for value, stored in (
    (membership.correctness(probs, labels), "correctness"),
    (membership.confidence(probs, labels), "confidence"),
    (membership.entropy(probs), "entropy"),
    (membership.modified_entropy(probs, labels), "m_entropy_song_mittal"),
    (membership.modified_entropy(probs, labels, reference=True), "m_entropy_as_coded"),
  ):
    np.testing.assert_allclose(value, svc(f"{name}_{stored}"), rtol=1e-12, atol=1e-12)


def test_svc_meets_the_reference(svc):
  expected = dict(zip(FEATURES, svc("forget_efficacy/acc"), strict=True))
  assert svc_mia(*_sets(svc), reference_entropy=True) == pytest.approx(expected, abs=1e-12)
  expected["modified_entropy"] = float(svc("forget_efficacy/acc_m_entropy_song_mittal"))
  assert svc_mia(*_sets(svc)) == pytest.approx(expected, abs=1e-12)


def test_balanced_members_are_as_many_as_the_test_rows(svc):
  """All of 120 retain rows and a balanced 100 of them give different machines."""
  sets = _sets(svc)
  rows = np.random.default_rng(3).permutation(120)[:100]
  chosen = svc_mia(sets[0][rows], sets[1][rows], *sets[2:])
  assert svc_mia(*sets, balance_seed=3) == chosen != svc_mia(*sets)


def test_fewer_members_than_test_rows_are_all_taken(svc):
  sets = _sets(svc)
  few = [sets[0][:60], sets[1][:60], *sets[2:]]
  assert svc_mia(*few, balance_seed=0) == pytest.approx(svc_mia(*few), abs=1e-12)


def _confident(size, seed, right):
  """Nearly certain predictions, of the label or of the class after it."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, size)
  certain = rng.uniform(0.95, 1, size)
  probs = np.repeat((1 - certain)[:, None] / 2, 3, axis=1)
  probs[np.arange(size), labels if right else (labels + 1) % 3] = certain
  return probs, labels


def test_forget_rows_that_look_like_one_side_are_taken_for_it():
  members, others = _confident(40, 0, True), _confident(30, 1, False)
  for forget, expected in ((_confident(20, 2, True), 0), (_confident(20, 3, False), 1)):
    values = svc_mia(*members, *others, *forget)
    for feature in ("correctness", "confidence", "modified_entropy"):
      assert values[feature] == expected, feature


def test_modified_entropy_of_certain_predictions():
  """0 where they are right; -2 log(1e-30), once for each of the two classes, where wrong."""
  values = membership.modified_entropy(np.eye(3)[[0, 1]], np.array([0, 2]))
  np.testing.assert_allclose(values, [0, 2 * 30 * np.log(10)], rtol=1e-12)


def test_modified_entropy_of_a_row_ignores_other_rows_unlike_the_references(svc):
  probs, labels = svc("target_test_prob"), svc("target_test_labels")
  alone = np.concatenate(
    [membership.modified_entropy(probs[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]
  )
  np.testing.assert_array_equal(alone, membership.modified_entropy(probs, labels))
  reference = membership.modified_entropy(probs, labels, reference=True)
  first = membership.modified_entropy(probs[:1], labels[:1], reference=True)
  assert abs(first[0] - reference[0]) > 1


def test_entropy_counts_nothing_for_impossible_classes():
  np.testing.assert_allclose(membership.entropy(np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0]])), [0, np.log(2)])


def test_probabilities_that_are_nan_give_nan(svc):
  sets = _sets(svc)
  sets[4] = np.full_like(sets[4], np.nan)
  values = svc_mia(*sets)
  assert tuple(values) == FEATURES and np.isnan(list(values.values())).all()


@pytest.mark.parametrize(
  "change, message",
  (
    ({"forget_probs": np.zeros((0, 3)), "forget_labels": np.zeros(0, int)}, "forget set has no"),
    ({"test_labels": np.array([0, 1])}, r"test .* shape \(3, 3\) and labels \(2,\)"),
    ({"test_probs": np.ones(3)}, r"test probabilities have shape \(3,\)"),
    ({"retain_labels": np.array([0, 1, 3])}, r"retain labels .*\[0, 3\]; give integers.* 0 to 2"),
    ({"retain_labels": np.array([-1, 1, 2])}, r"retain labels are int64 in \[-1, 2\]"),
    ({"retain_labels": np.array([0.0, 1.0, 2.0])}, "retain labels are float64"),
    ({"forget_probs": 3 * np.eye(3)}, r"forget probabilities lie in \[0, 3\].*softmax"),
    (
      {"forget_probs": np.full((3, 2), 0.5), "forget_labels": np.array([0, 1, 1])},
      "retain 3, test 3, forget 2",
    ),
  ),
)
def test_sets_that_do_not_fit(change, message):
  sets = {
    f"{name}_{kind}": value
    for name in ("retain", "test", "forget")
    for kind, value in (("probs", np.eye(3)), ("labels", np.arange(3)))
  }
  with pytest.raises(UserError, match=message) as error:
    svc_mia(**sets | change)
  assert "\n" not in str(error.value)
