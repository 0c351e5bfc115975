"""TOFU's metrics against its published runs, open-unlearning's formulas and closed forms."""

import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hamu_jax.errors import UserError
from hamu_jax.metrics import tofu

FULL, RETAINED = "llama2-7b_full_wd0.01", "llama2-7b_retain90_wd0.01"
LOSSES = ("avg_gt_loss", "average_perturb_loss", "avg_paraphrased_loss")
# What the golden index calls the means of `split_scores`.
NAMES = {"rouge": "rouge", "probability": "prob", "truth_ratio": "truth_ratio"}


@pytest.fixture
def index(golden):
  """What was published of the runs, and Kolmogorov-Smirnov tests of their rows."""
  return json.loads((golden / "tofu" / "index.json").read_text())


@pytest.fixture(params=(FULL, RETAINED))
def log(request):
  """Name of one published run."""
  return request.param


@pytest.fixture
def run(golden):
  """-> function: the arrays of a run by split and name, in float64."""

  def load(log):
    with np.load(golden / "tofu" / f"{log}.npz", allow_pickle=False) as arrays:
      return {
        split: {
          name: arrays[f"{split}__{name}"].astype(np.float64)
          for name in (*LOSSES, "rougeL_recall", "truth_ratio")
        }
        | {
          name: arrays[f"expected__{split}__{name}"]
          for name in ("prob", "truth_ratio_R", "truth_ratio_score")
        }
        for split in tofu.SPLITS
      }

  return load


# Published runs


def test_examples_are_the_published_ones(run, log):
  for split, values in run(log).items():
    scores = tofu.split_scores(split, values)
    np.testing.assert_allclose(scores["probability"], values["prob"], rtol=1e-12)
    np.testing.assert_allclose(scores["truth_ratio"], values["truth_ratio_score"], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(scores["rouge"], values["rougeL_recall"])
    ratio = tofu.truth_ratio(values["avg_paraphrased_loss"], values["average_perturb_loss"])
    np.testing.assert_allclose(ratio, 1 / values["truth_ratio_R"], rtol=1e-12)
    # What the run logged itself, in float32.
    np.testing.assert_allclose(ratio, values["truth_ratio"], rtol=1e-5)


def _once(splits):
  """open-unlearning evaluates the answers of real authors and world facts once."""
  return {
    split: {
      name: value
      for name, value in values.items()
      if name != "avg_paraphrased_loss" or split in ("retain", "forget")
    }
    for split, values in splits.items()
  }


# The tolerance tells open-unlearning's 1e-10 from none.
@pytest.mark.parametrize(
  "published, variant, prepare",
  (
    ("tofu_aggregate_eval_stat", "geometric", dict),
    ("tofu_utils_py_arithmetic", "arithmetic", dict),
    ("open_unlearning_same_inputs", "open_unlearning", dict),
    ("open_unlearning_strict", "open_unlearning", _once),
  ),
)
def test_means_and_utility_are_the_published_ones(run, index, log, published, variant, prepare):
  # What is published of the arithmetic variant is only what it changes.
  expected = index["logs"][log]["tofu_aggregate_eval_stat"] | index["logs"][log][published]
  splits = prepare(run(log))
  assert tofu.model_utility(splits, variant=variant) == pytest.approx(expected["model_utility"], rel=1e-11)
  for split, values in splits.items():
    for name, scores in tofu.split_scores(split, values, variant=variant).items():
      key = f"{NAMES[name]}_{split}"
      assert scores.mean() == pytest.approx(expected[key], rel=1e-11), key


def test_prob_mean_is_open_unlearnings(run, index, log):
  for split, values in run(log).items():
    score = tofu.truth_ratio_score(
      values["avg_paraphrased_loss"],
      values["average_perturb_loss"],
      aggregate="prob_mean",
      variant="open_unlearning",
    )
    expected = index["logs"][log]["open_unlearning_same_inputs"]
    assert score.mean() == pytest.approx(expected[f"truth_ratio_prob_mean_{split}"], rel=1e-11)


def test_forget_quality_is_the_published_one(run, index):
  cases = index["forget_quality"]
  assert len(cases) == 8
  ratios = {
    log: tofu.truth_ratio(values["avg_paraphrased_loss"], values["average_perturb_loss"])
    for log in (FULL, RETAINED)
    for values in [run(log)["forget"]]
  }
  for case in cases:
    unlearned = ratios[case["unlearned"]][slice(*case.get("rows_unlearned", [None]))]
    retained = ratios[case["reference"]][slice(*case.get("rows_reference", [None]))]
    assert (unlearned.size, retained.size) == (case["n"], case["m"])
    assert tofu.forget_quality(unlearned, retained) == pytest.approx(case["forget_quality_pvalue"], rel=1e-9)
    assert tofu.truth_ratio_distance(unlearned, retained) == pytest.approx(case["ks_statistic"], abs=1e-12)
    assert tofu.forget_quality(1 / unlearned, 1 / retained) == pytest.approx(
      case["forget_quality_pvalue"], rel=1e-9
    )


# Closed forms


def test_probability_by_hand():
  np.testing.assert_allclose(tofu.probability(np.log([2.0, 4.0])), [0.5, 0.25], rtol=1e-15)
  among = tofu.probability(np.log([2.0, 4.0]), np.log([[4.0, 4.0], [2.0, 4.0]]))
  np.testing.assert_allclose(among, [0.5, 0.25], rtol=1e-15)


def test_truth_ratio_by_hand():
  """Wrong answers of 1/2 and 1/8 have the geometric mean 1/4 and the arithmetic mean 5/16."""
  right, wrong = np.log([2.0]), np.log([[2.0, 8.0]])
  for variant, expected in (("geometric", 1 / 2), ("arithmetic", 5 / 8)):
    for aggregate, score in (
      ("closer_to_1_better", expected),
      ("true_better", 1 - expected),
      ("prob_mean", 1 / (1 + expected)),
    ):
      assert tofu.truth_ratio_score(right, wrong, aggregate=aggregate, variant=variant) == pytest.approx(
        score, rel=1e-14
      )
    assert tofu.truth_ratio(right, wrong, variant=variant) == pytest.approx(expected, rel=1e-14)


losses = st.floats(0, 40)


@given(losses, st.lists(losses, min_size=1, max_size=5))
def test_arithmetic_mean_is_the_larger_one(right, wrong):
  ratios = [tofu.truth_ratio([right], [wrong], variant=variant)[0] for variant in ("geometric", "arithmetic")]
  assert ratios[0] <= ratios[1] * (1 + 1e-9)


@given(losses, losses)
def test_right_and_wrong_can_be_exchanged_where_closer_to_1_is_better(right, wrong):
  score, exchanged = (
    tofu.truth_ratio_score([a], [[b]], aggregate="closer_to_1_better")[0]
    for a, b in ((right, wrong), (wrong, right))
  )
  assert score == pytest.approx(exchanged, rel=1e-12)
  assert score == pytest.approx(math.exp(-abs(right - wrong)), rel=1e-12)


@pytest.mark.filterwarnings("error")
def test_losses_whose_probabilities_underflow():
  """A model that gradient ascent has destroyed: exp(-1000) and exp(1000) are not numbers."""
  lost, kept = [1000.0], [[1.0, 1.0]]
  assert tofu.probability(lost, [[1000.0] * 3]) == 0.25
  assert tofu.probability(lost, kept) == 0
  for variant in ("geometric", "arithmetic"):
    assert tofu.truth_ratio(lost, kept, variant=variant) == np.inf
    for aggregate in tofu.AGGREGATES:
      assert tofu.truth_ratio_score(lost, kept, aggregate=aggregate, variant=variant) == 0
    assert tofu.truth_ratio([1.0], [[1000.0] * 2], variant=variant) == 0
    # Equally unlikely is equally likely.
    assert tofu.truth_ratio(lost, [[1000.0] * 2], variant=variant) == pytest.approx(1)
  # Its epsilon, far above such probabilities, decides.
  assert tofu.probability(lost, [[1000.0] * 3], variant="open_unlearning") == 0
  assert tofu.truth_ratio(lost, [[1000.0]], variant="open_unlearning") == 0
  assert tofu.truth_ratio(lost, [[0.0]], variant="open_unlearning") == pytest.approx(1e10)


@pytest.mark.parametrize("n, m", ((1, 1), (3, 5), (20, 20)))
def test_separated_samples(n, m):
  """Two of the equally likely orders of n + m values separate the samples."""
  low, high = np.linspace(0, 1, n), np.linspace(2, 3, m)
  assert tofu.forget_quality(low, high) == pytest.approx(2 / math.comb(n + m, n), rel=1e-9)
  assert tofu.truth_ratio_distance(low, high) == 1


def test_quality_of_a_ratio_that_is_nan():
  assert np.isnan(tofu.forget_quality([1.0, np.nan], [1.0, 2.0]))


# Utility


def _splits(**changes):
  """A right answer of probability 1/2 and a wrong one of 1/4 on every question."""
  values = {
    "rougeL_recall": [0.25, 0.75],
    "avg_gt_loss": [np.log(2)] * 2,
    "avg_paraphrased_loss": [np.log(2)] * 2,
    "average_perturb_loss": [[np.log(4)]] * 2,
  }
  return {split: values | changes for split in ("retain", "real_authors", "world_facts")}


def test_utility_is_the_harmonic_mean():
  """1/2 seven times, and 2/3 where the answer's 1/2 stands against the wrong one's 1/4."""
  splits = _splits()
  for split, values in splits.items():
    means = {name: scores.mean() for name, scores in tofu.split_scores(split, values).items()}
    probability = 1 / 2 if split == "retain" else 2 / 3
    assert means == pytest.approx({"rouge": 1 / 2, "probability": probability, "truth_ratio": 1 / 2})
  assert tofu.model_utility(splits) == pytest.approx(9 / (7 * 2 + 2 * 3 / 2), rel=1e-14)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("recall, utility", ((0.0, 0.0), (np.nan, np.nan)))
def test_utility_of_a_model_that_answers_nothing(recall, utility):
  assert tofu.model_utility(_splits(rougeL_recall=[recall, recall])) == pytest.approx(utility, nan_ok=True)


def test_scores_without_their_arrays_are_left_out():
  """Questions without wrong answers, as the plain retain and forget sets have them."""
  assert set(tofu.split_scores("retain", {"avg_gt_loss": [1.0]})) == {"probability"}
  assert set(tofu.split_scores("forget", {"rougeL_recall": [1.0]})) == {"rouge"}
  assert tofu.split_scores("world_facts", {"avg_gt_loss": [1.0]}) == {}
  assert set(tofu.split_scores("world_facts", {"avg_gt_loss": [1.0], "average_perturb_loss": [[1.0]]})) == {
    "probability",
    "truth_ratio",
  }


# ROUGE


def test_rouge_of_published_answers(golden):
  """Stemming, order, hyphens, digits, accents and empty matches, to the last bit."""
  pytest.importorskip("rouge_score")
  pairs = json.loads((golden / "tofu" / "rouge_pairs.json").read_text())["pairs"]
  assert {"stemmer_matters", "order_matters", "non_ascii", "zero"} <= {
    tag for pair in pairs for tag in pair["tags"]
  }
  values = tofu.rouge([pair["generation"] for pair in pairs], [pair["reference"] for pair in pairs])
  for kind in ("rouge1", "rougeL"):
    assert values[f"{kind}_recall"].tolist() == [pair[kind] for pair in pairs]


def test_rouge_by_hand():
  pytest.importorskip("rouge_score")
  values = tofu.rouge(["the cat sat down there", "", "running"], ["sat the cat", "a b", "He runs"])
  assert values["rouge1_recall"].tolist() == [1, 0, 1 / 2]
  assert values["rougeL_recall"].tolist() == [2 / 3, 0, 1 / 2]


def test_rouge_without_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
  with pytest.raises(UserError, match=r"rouge-score, which is not installed; .*\[llm\]"):
    tofu.rouge(["a"], ["a"])


# Bad input


@pytest.mark.parametrize(
  "call, message",
  (
    (
      lambda: tofu.probability([1.0], variant="mean"),
      "unknown variant 'mean'; choose from geometric, arithmetic, open_unlearning",
    ),
    (lambda: tofu.probability([]), r"avg_gt_loss has shape \(0,\); give \[N\]"),
    (lambda: tofu.probability([1.0], [1.0]), r"average_perturb_loss has shape \(1,\).*\[N, K\]"),
    (lambda: tofu.probability([1.0], [[1.0], [2.0]]), "avg_gt_loss has 1 examples and .* 2"),
    (lambda: tofu.probability([-2.5]), "avg_gt_loss goes down to -2.5; give negative log-lik"),
    (lambda: tofu.truth_ratio([1.0], [[-1.0]]), "average_perturb_loss goes down to -1"),
    (lambda: tofu.truth_ratio([[1.0]], [[1.0]]), "avg_paraphrased_loss has shape"),
    (
      lambda: tofu.truth_ratio_score([1.0], [[1.0]], aggregate="mean"),
      "unknown aggregate 'mean'; choose from closer_to_1_better, true_better, prob_mean",
    ),
    (lambda: tofu.rouge("a", "a"), "predictions is one text; give a list"),
    (lambda: tofu.rouge(["a"], "a"), "references is one text; give a list"),
    (lambda: tofu.rouge([], []), "0 predictions for 0 references"),
    (lambda: tofu.rouge(["a"], ["a", "b"]), "1 predictions for 2 references"),
    (lambda: tofu.split_scores("test", {}), "unknown split 'test'; choose from retain, forget"),
    (lambda: tofu.split_scores("retain", {"rougeL_recall": [98.0]}), "not percent"),
    (lambda: tofu.split_scores("retain", {"rougeL_recall": 0.5}), r"rougeL_recall has shape \(\)"),
    (
      lambda: tofu.split_scores("retain", {"rougeL_recall": [0.5], "avg_gt_loss": [1.0, 2.0]}),
      "retain has different numbers of examples .rouge 1, probability 2",
    ),
    (lambda: tofu.model_utility({"retain": {}}), "the rouge of retain needs rougeL_recall .*none"),
    (
      lambda: tofu.model_utility(
        {"forget": {}}
        | _splits()
        | {"retain": {"rougeL_recall": [0.5], "avg_gt_loss": [1.0], "average_perturb_loss": [[1.0]]}}
      ),
      "truth_ratio of retain needs avg_paraphrased_loss and average_perturb_loss .there are rouge",
    ),
    (
      lambda: tofu.model_utility({"retain": _splits()["retain"]}),
      "no values for real_authors .there are retain.; give retain, real_authors, world_facts",
    ),
    (lambda: tofu.forget_quality([], [1.0]), "the unlearned model has no truth ratios"),
    (lambda: tofu.truth_ratio_distance([1.0], []), "the retained model has no truth ratios"),
  ),
)
def test_bad_input(call, message):
  with pytest.raises(UserError, match=message) as error:
    call()
  assert "\n" not in str(error.value)
