"""Selection by memorization: the reference's examples; the estimator: counts made by hand."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sam_jax.memorization import LEVELS, memorization_scores, select, subsample

# The numbers of the reference's command line.
REFERENCE = {"high": "mem4", "mid": "mem2", "low": "mem0"}


@pytest.fixture
def selection(golden):
  with np.load(golden / "sam" / "selection.npz") as data:
    return dict(data)


@pytest.mark.parametrize("level", REFERENCE)
@pytest.mark.parametrize("size", [60, 50, 49])
@pytest.mark.parametrize("case", ["continuous", "ties"])
def test_levels_are_the_reference_rows_in_its_order(selection, case, size, level):
  indices = select(selection[f"{case}/scores"], size, level)
  np.testing.assert_array_equal(indices, selection[f"{case}/n{size}/{REFERENCE[level]}"])


# Of a size that leaves 2 by three the reference loses an example.
@pytest.mark.parametrize("size", [60, 49])
@pytest.mark.parametrize("case", ["continuous", "ties"])
def test_mixed_is_the_reference_where_that_loses_no_row(selection, case, size):
  indices = select(selection[f"{case}/scores"], size, "mixed")
  np.testing.assert_array_equal(indices, selection[f"{case}/n{size}/mix"])


@pytest.mark.parametrize("level", ["high", "mid", "low"])
def test_scores_matched_by_id_choose_the_reference_imagenet_rows(selection, level):
  ids = {name: index for index, name in enumerate(selection["imagenet/score_file_id"])}
  scores = selection["imagenet/tr_mem"][[ids[name] for name in selection["imagenet/dataset_id"]]]
  # The reference lists these in the order of the dataset.
  np.testing.assert_array_equal(np.sort(select(scores, 40, level)), selection[f"imagenet/{level}"])


SCORES = st.lists(st.sampled_from(np.linspace(-0.2, 1, 25).tolist()), min_size=1, max_size=40)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(scores=SCORES, data=st.data())
def test_mixed_has_its_thirds_without_duplicates_or_losses(scores, data):
  size = data.draw(st.integers(1, len(scores)))
  scores = np.array(scores)
  indices = select(scores, size, "mixed")
  assert len(indices) == len(set(indices)) == size
  third, over = divmod(size, 3)
  n_high, n_low = third + (over == 2), third + (over > 0)
  high, mid, low = np.split(indices, [n_high, size - n_low])
  ordered = np.sort(scores)[::-1]
  np.testing.assert_array_equal(scores[high], ordered[:n_high])
  np.testing.assert_array_equal(scores[low], ordered[len(scores) - n_low :])
  left = np.setdiff1d(np.arange(len(scores)), indices)
  distance = np.abs(scores - 0.5)
  assert len(mid) == third
  assert not len(mid) or not len(left) or distance[mid].max() <= distance[left].min()


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(scores=SCORES, data=st.data())
def test_levels_are_extreme_and_whole(scores, data):
  size = data.draw(st.integers(1, len(scores)))
  scores = np.array(scores)
  for level, sign in (("high", 1), ("low", -1)):
    indices = select(scores, size, level)
    assert len(set(indices)) == size
    expected = np.sort(sign * scores)[::-1][:size]
    np.testing.assert_array_equal(np.sort(sign * scores[indices])[::-1], expected)
  assert set(select(scores, len(scores), "mid")) == set(range(len(scores)))


@pytest.mark.parametrize(
  "scores, size, level, message",
  [
    ([0.1, 0.2], 1, "medium", "memorization level 'medium': choose from high, mid, low, mixed"),
    ([0.1, 0.2], 0, "high", "0 examples of 2 by memorization: choose 1..2"),
    ([0.1, 0.2], 3, "mixed", "choose 1..2"),
    ([0.1, np.nan], 1, "low", "one finite number per example, .* 1 values that are not finite"),
    ([[0.1], [0.2]], 1, "low", r"have shape \(2, 1\)"),
  ],
)
def test_select_refuses(scores, size, level, message):
  with pytest.raises(ValueError, match=message) as error:
    select(np.array(scores), size, level)
  assert "\n" not in str(error.value)


def test_every_level_is_exercised_here():
  assert set(LEVELS) == {*REFERENCE, "mixed"}


@pytest.mark.parametrize("examples, fraction, size", [(100, 0.7, 70), (1438, 0.7, 1007), (7, 0.5, 4)])
def test_subsets_have_exactly_the_fraction(examples, fraction, size):
  included = subsample(examples, 5, fraction, seed=3)
  assert included.shape == (5, examples) and included.dtype == bool
  assert (included.sum(1) == size).all()


def test_subsets_depend_on_the_seed_and_the_model_alone():
  few, many = subsample(50, 3, 0.5, seed=1), subsample(50, 8, 0.5, seed=1)
  np.testing.assert_array_equal(many[:3], few)
  assert len({index.tobytes() for index in many}) == 8
  assert (subsample(50, 3, 0.5, seed=2) != few).any()


def test_every_row_is_drawn_equally_often():
  # 2,000 draws at 0.7: a standard error of 0.0102, and the extreme of 40 examples within 4 of them.
  share = subsample(40, 2000, 0.7, seed=0).mean(0)
  np.testing.assert_allclose(share, 0.7, atol=0.045)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 0.001, 0.999, float("nan")])
def test_subsets_that_are_empty_or_everything_are_refused(fraction):
  with pytest.raises(ValueError, match=r"choose a fraction in \(0, 1\)"):
    subsample(10, 2, fraction, seed=0)


def test_scores_are_the_difference_of_two_frequencies():
  included = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0]], bool)
  correct = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 1, 0]], bool)
  # Row 0: right 2/2 in, 0/2 out. Row 1: 2/2 in, 1/2 out. Row 2: 1/2 in, 1/2 out.
  np.testing.assert_array_equal(memorization_scores(correct, included), [1.0, 0.5, 0.0])


def test_scores_find_the_probabilities_that_made_the_outcomes():
  rng = np.random.default_rng(0)
  known_in, known_out = rng.uniform(size=(2, 30))
  included = subsample(30, 4000, 0.6, seed=5)
  correct = rng.uniform(size=included.shape) < np.where(included, known_in, known_out)
  # Two frequencies of 2,400 and 1,600 outcomes: a standard error of at most 0.0162.
  scores = memorization_scores(correct, included)
  np.testing.assert_allclose(scores, known_in - known_out, atol=0.07)


@pytest.mark.parametrize(
  "included, message",
  [
    ([[1, 0], [0, 0]], "1 of 2 examples are in no training subset and 0 in all.*than 2 models"),
    ([[1, 1], [0, 1]], "0 of 2 examples are in no training subset and 1 in all"),
    ([[1, 0, 1], [0, 1, 0]], r"not of \(2, 2\) and \(2, 3\)"),
  ],
)
def test_undefined_scores_are_refused(included, message):
  with pytest.raises(ValueError, match=message) as error:
    memorization_scores(np.ones((2, 2)), np.array(included))
  assert "\n" not in str(error.value)
