"""Classification metrics against NumPy, closed forms and the reference's golden numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from hamu_jax.errors import UserError
from hamu_jax.metrics.classification import per_example, summarize

SPLITS = ("retain", "forget", "test")


@pytest.fixture(params=(0, 1))
def case(golden, request):
  """One recorded evaluation of the reference: its arrays by their short names."""
  prefix = f"vision_metrics/{request.param}/"
  with np.load(golden / "metrics.npz", allow_pickle=False) as arrays:
    return {k.removeprefix(prefix): arrays[k] for k in arrays.files if k.startswith(prefix)}


def _examples(case, split, dtype):
  logits = jnp.asarray(case[f"{split}_logits"], dtype)
  return per_example(logits, jnp.asarray(case[f"{split}_labels"], jnp.int32))


def _mean_of_batch_means(values, size):
  return np.mean([np.mean(values[i : i + size]) for i in range(0, len(values), size)])


@pytest.mark.parametrize("split", SPLITS)
def test_reference(case, split, x64):
  """Per example we agree; the reference's means are over batch means, which ours are not."""
  examples = _examples(case, split, jnp.float64)
  np.testing.assert_allclose(examples["loss"], case[f"eval_{split}_mean_losses"], rtol=1e-9)
  size = int(case["eval_batch_size"])
  for metric, name in (("accuracy", "correct"), ("entropy", "entropy")):
    theirs = float(case[f"eval_{split}_{metric}"])
    assert _mean_of_batch_means(np.asarray(examples[name]), size) == pytest.approx(theirs, rel=1e-9)
    ours = summarize(examples)[metric]
    assert ours == pytest.approx(np.asarray(examples[name]).mean(), rel=1e-12)
    # The 64 fit into one batch; of 10, the last is short and weighs too much.
    assert (ours == pytest.approx(theirs, rel=1e-9)) == (size == 64)


@pytest.mark.parametrize("dtype", ("float32", "float64", "bfloat16"))
def test_output_keeps_the_dtype(dtype, x64):
  logits = jax.random.normal(jax.random.key(0), (5, 3), dtype)
  examples = per_example(logits, jnp.zeros(5, jnp.int32))
  assert {str(v.dtype) for v in examples.values()} == {dtype}
  assert {v.shape for v in examples.values()} == {(5,)}


def test_per_example_against_scipy(x64):
  rng = np.random.default_rng(0)
  logits, labels = 5 * rng.normal(size=(40, 7)), rng.integers(7, size=40)
  examples = per_example(jnp.asarray(logits), jnp.asarray(labels))
  probs = special.softmax(logits, axis=-1)
  np.testing.assert_allclose(examples["loss"], -np.log(probs[np.arange(40), labels]), rtol=1e-12)
  np.testing.assert_allclose(examples["entropy"], special.entr(probs).sum(-1), rtol=1e-12)
  np.testing.assert_array_equal(examples["correct"], probs.argmax(-1) == labels)


def test_extreme_logits_stay_finite_where_the_limit_is():
  logits = jnp.array([[1e4, 0.0, 0.0], [0.0, -jnp.inf, 0.0], [0.0, 0.0, 0.0]])
  examples = per_example(logits, jnp.array([1, 0, 2]))
  np.testing.assert_allclose(examples["loss"], [1e4, np.log(2), np.log(3)], rtol=1e-6)
  np.testing.assert_allclose(examples["entropy"], [0, np.log(2), np.log(3)], atol=1e-6)


def test_masked_padding_changes_nothing():
  rng = np.random.default_rng(1)
  examples = {name: rng.random(13).astype(np.float32) for name in ("loss", "correct", "entropy")}
  padding = np.array([np.nan, 1e9, -5], np.float32)
  padded = {name: np.append(values, padding) for name, values in examples.items()}
  mask = np.arange(16) < 13
  summary = summarize(padded, mask)
  assert summary["count"] == 13
  assert summary["accuracy"] == pytest.approx(examples["correct"].mean(), rel=1e-6)
  assert summary["loss"] == pytest.approx(examples["loss"].mean(), rel=1e-6)
  assert summary["entropy"] == pytest.approx(examples["entropy"].mean(), rel=1e-6)
  assert summary == pytest.approx(summarize(examples), rel=1e-6)


def test_summary_holds_python_numbers():
  summary = summarize({name: np.ones(3, np.float32) for name in ("loss", "correct", "entropy")})
  assert {name: type(v) for name, v in summary.items()} == {
    "accuracy": float,
    "loss": float,
    "entropy": float,
    "count": int,
  }


@pytest.mark.parametrize("mask, size", ((None, 0), (np.zeros(4, bool), 4)))
def test_nothing_to_average_is_an_error(mask, size):
  examples = {name: np.ones(size, np.float32) for name in ("loss", "correct", "entropy")}
  with pytest.raises(UserError, match="without a single example"):
    summarize(examples, mask)
