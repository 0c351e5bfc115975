"""Entanglement against the reference's golden numbers, closed forms and its own symmetries."""

import builtins

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from sam_jax.entanglement import (
  REFERENCE_NORMALIZER,
  knn_entanglement,
  shared_classes,
  silhouette_entanglement,
  svm_entanglement,
  variance_entanglement,
  wasserstein_entanglement,
)

MEASURES = {
  "variance": lambda *sets, **labels: variance_entanglement(*sets, **labels, normalizer=REFERENCE_NORMALIZER),
  "wasserstein": wasserstein_entanglement,
  "silhouette": silhouette_entanglement,
  "knn": knn_entanglement,
}


def _clusters(seed, shift, size=30, features=4):
  """Retain and forget features, and their labels in 0..2; `shift` moves the forget features."""
  rng = np.random.default_rng(seed)
  retain, forget = rng.normal(size=(2, size, features))
  forget[:, 0] += shift
  return (
    retain,
    forget,
    {"retain_labels": rng.integers(0, 3, size), "forget_labels": rng.integers(0, 3, size)},
  )


@pytest.mark.parametrize("case", ("separated", "mixed", "identical"))
@pytest.mark.parametrize("name", MEASURES)
def test_golden(golden, case, name):
  with np.load(golden / "sam" / "evaluation.npz", allow_pickle=False) as arrays:
    stored = lambda key: arrays[f"entanglement/{case}/{key}"]
    sets = stored("retain_embeddings"), stored("forget_embeddings")
    labels = {key: stored(key) for key in ("retain_labels", "forget_labels")}
    measure = MEASURES[name]
    assert measure(*sets) == pytest.approx(float(stored(f"{name}_global")), abs=1e-12)
    assert measure(*sets, **labels) == pytest.approx(float(stored(f"{name}_class")), abs=1e-12)


@pytest.mark.parametrize("case", ("separated", "mixed", "identical"))
def test_golden_ratio(golden, case):
  with np.load(golden / "sam" / "evaluation.npz", allow_pickle=False) as arrays:
    stored = lambda key: arrays[f"entanglement/{case}/{key}"]
    value = variance_entanglement(stored("retain_embeddings"), stored("forget_embeddings"))
    assert value == pytest.approx(float(stored("variance_global_raw")), rel=1e-9)


def test_variance_by_hand():
  """Unit vectors at 0 and 90 degrees against one at 180: V_R = 1/2, V_F = 0, means (1/2, 1/2),
  (-1, 0) and, of all three, (0, 1/3)."""
  retain, forget = np.array([[2.0, 0], [0, 5]]), np.array([[-3.0, 0]])
  between = 0.5 * ((1 / 4 + 1 / 36) + (1 + 1 / 9))
  assert variance_entanglement(retain, forget) == pytest.approx(0.5 / between)
  assert variance_entanglement(retain, forget, normalizer=2) == pytest.approx(0.25 / between)
  assert variance_entanglement(retain, forget, normalizer=0.5) == 1


def test_wasserstein_by_hand():
  """Half the mass stays where it is, half crosses from (1, 0) to (-1, 0), the largest distance."""
  retain, forget = np.array([[1.0, 0], [-1, 0]]), np.array([[-1.0, 0]])
  assert wasserstein_entanglement(retain, forget) == pytest.approx(0.5)


def test_svm_is_the_error_of_support_vector_machines_on_each_fifth():
  """Folds by hand, and the machine as the minimum of |w|^2 / 2 + C sum max(0, 1 - y f(x))^2."""
  retain, forget, _ = _clusters(1, 1.5, size=20)
  points = np.concatenate([retain, forget])
  points = np.hstack([points / np.linalg.norm(points, axis=1, keepdims=True), np.ones((40, 1))])
  signs = np.repeat([-1.0, 1.0], 20)
  wrong = 0
  for fold in range(5):
    test = np.arange(40) % 20 // 4 == fold
    x, y = points[~test], signs[~test]

    def loss(w):
      margins = np.maximum(0, 1 - y * (x @ w))
      return w @ w / 2 + 0.01 * np.square(margins).sum(), w - 0.02 * x.T @ (y * margins)

    w = optimize.minimize(loss, np.zeros(5), jac=True, tol=1e-12).x
    wrong += ((points[test] @ w > 0) != (signs[test] > 0)).sum()
  assert svm_entanglement(retain, forget) == pytest.approx(wrong / 40, abs=1e-12)
  assert 0 < wrong < 20
  assert svm_entanglement(retain + [9, 0, 0, 0], forget - [9, 0, 0, 0]) == 0


def test_class_wise_is_the_mean_weighted_by_size():
  """Class 2 is in one set alone; class 1 has three times the examples of class 0."""
  retain, forget, _ = _clusters(0, 1.0, size=24)
  labels = np.repeat([0, 1], [6, 18])
  for measure in (variance_entanglement, wasserstein_entanglement, silhouette_entanglement):
    parts = [measure(retain[labels == label], forget[labels == label]) for label in (0, 1)]
    value = measure(
      np.vstack([retain, np.eye(4)]), forget, retain_labels=np.append(labels, [2] * 4), forget_labels=labels
    )
    assert value == pytest.approx(0.25 * parts[0] + 0.75 * parts[1])


def test_equal_means_are_fully_entangled():
  """The reference calls them not entangled at all, and leaves such classes out."""
  same = np.array([[1.0, 0], [-1, 0]])
  assert variance_entanglement(same, same, normalizer=REFERENCE_NORMALIZER) == 1
  labels = np.array([0, 0, 1, 1])
  retain = np.vstack([same, [[1.0, 0], [0, 1]]])
  forget = np.vstack([same, [[-1.0, 0], [0, -1]]])
  # Class 1: V = 1/2 a side, means (1/2, 1/2) and its opposite: a ratio of 2.
  value = variance_entanglement(retain, forget, retain_labels=labels, forget_labels=labels, normalizer=8)
  assert value == pytest.approx((1 + 2 / 8) / 2)


@pytest.mark.parametrize("name", ("variance", "wasserstein"))
def test_one_place_is_fully_entangled(name):
  assert MEASURES[name](np.ones((3, 2)), 7 * np.ones((2, 2))) == 1
  assert MEASURES[name](np.zeros((3, 2)), np.zeros((2, 2))) == 1


@given(st.integers(0, 1000), st.floats(0, 3), st.sampled_from(sorted(MEASURES)), st.booleans())
def test_order_scale_and_units_do_not_matter(seed, shift, name, class_wise):
  """Neither the order of the examples does, nor their lengths, nor a rotation of the features."""
  retain, forget, labels = _clusters(seed, shift)
  if name == "knn":
    labels = {key: np.minimum(value, 0) for key, value in labels.items()}
  rng = np.random.default_rng(seed)
  r, f = rng.permutation(len(retain)), rng.permutation(len(forget))
  rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
  lengths = rng.uniform(0.1, 10, (len(retain), 1))
  shuffled = {key: labels[key][order] for key, order in (("retain_labels", r), ("forget_labels", f))}
  value = MEASURES[name](retain, forget, **labels if class_wise else {})
  other = MEASURES[name](
    (lengths * retain)[r] @ rotation, forget[f] @ rotation, **shuffled if class_wise else {}
  )
  assert other == pytest.approx(value, rel=1e-6, abs=1e-9)
  assert 0 <= value <= 1


@given(st.integers(0, 1000), st.sampled_from(sorted(MEASURES)))
def test_sets_far_apart_are_less_entangled_than_one_set(seed, name):
  retain, forget, _ = _clusters(seed, 0)
  same = MEASURES[name](retain, retain)
  apart = MEASURES[name](retain + [9, 0, 0, 0], forget - [9, 0, 0, 0])
  assert apart < 0.4 * same
  # No two sets are more entangled than a set with itself.
  if name in ("variance", "wasserstein"):
    assert same == pytest.approx(1, abs=1e-9)
  else:
    assert same >= 0.5 - 1e-9


def test_silhouette_and_neighbours_of_separate_sets_are_almost_zero():
  retain, forget, _ = _clusters(1, 0)
  sets = retain + [90, 0, 0, 0], forget - [90, 0, 0, 0]
  assert silhouette_entanglement(*sets) < 0.01
  assert knn_entanglement(*sets) == 0


def test_a_point_is_not_its_own_neighbour():
  """Three twins, one of each set: the only neighbour of each is its twin."""
  features = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
  assert knn_entanglement(features, features, k=1) == 1


def test_large_sets_are_sampled_reproducibly():
  retain, forget, _ = _clusters(2, 0.5, size=60)
  all_of_it = wasserstein_entanglement(retain, forget)
  sampled = wasserstein_entanglement(retain, forget, max_samples=20)
  assert sampled == wasserstein_entanglement(retain, forget, max_samples=20)
  assert sampled != wasserstein_entanglement(retain, forget, max_samples=20, seed=1)
  assert sampled != all_of_it
  assert wasserstein_entanglement(retain, forget, max_samples=60) == all_of_it


def test_shared_classes():
  retain, forget = np.array([0, 0, 1, 1, 2, 3]), np.array([0, 0, 1, 2, 2, 5])
  assert shared_classes(retain, forget) == [0, 1, 2]
  assert shared_classes(retain, forget, least=2) == [0]
  assert shared_classes(retain, forget, least=3) == []


@pytest.mark.parametrize(
  "measure, least",
  (
    (wasserstein_entanglement, 2),
    (silhouette_entanglement, 2),
    (knn_entanglement, 11),
    (svm_entanglement, 5),
  ),
)
def test_small_classes_are_left_out(measure, least):
  """Class 1 has one example too few on the forget side."""
  rng = np.random.default_rng(0)
  retain, forget = rng.normal(size=(40, 3)), rng.normal(size=(20 + least - 1, 3))
  labels = {"retain_labels": np.repeat([0, 1], 20), "forget_labels": np.repeat([0, 1], [20, least - 1])}
  assert measure(retain, forget, **labels) == pytest.approx(measure(retain[:20], forget[:20]))
  with pytest.raises(ValueError, match=f"no class has {least} example"):
    measure(retain[20:], forget, retain_labels=np.ones(20), forget_labels=np.zeros(20 + least - 1))


@pytest.mark.parametrize(
  "sets, labels, message",
  (
    ((np.ones((0, 2)), np.ones((3, 2))), {}, r"retain features have shape \(0, 2\)"),
    ((np.ones((3, 2)), np.ones(3)), {}, r"forget features have shape \(3,\)"),
    ((np.ones((3, 2)), np.ones((3, 4))), {}, "retain features have 2 columns and forget .* 4"),
    ((np.ones((3, 2)), np.full((3, 2), np.nan)), {}, "forget features are not finite"),
    ((np.ones((3, 2)), np.ones((3, 2))), {"retain_labels": [0, 0, 0]}, "forget_labels have shape None"),
    (
      (np.ones((3, 2)), np.ones((3, 2))),
      {"retain_labels": [0], "forget_labels": [0, 0, 0]},
      r"retain_labels have shape \(1,\) for 3",
    ),
    (
      (np.ones((3, 2)), np.ones((3, 2))),
      {"retain_labels": [0] * 3, "forget_labels": [1] * 3},
      "no class has 1 example",
    ),
  ),
)
def test_bad_input_gets_one_line(sets, labels, message):
  with pytest.raises(ValueError, match=message) as error:
    variance_entanglement(*sets, **labels)
  assert "\n" not in str(error.value)


def test_missing_transport_library_names_the_extra(monkeypatch):
  actual = builtins.__import__

  def without(name, *args, **kwargs):
    if name == "ot":
      raise ImportError(name)
    return actual(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(ValueError, match=r"pip install 'hamu-jax\[analysis\]'"):
    wasserstein_entanglement(np.ones((2, 2)), np.ones((2, 2)))
