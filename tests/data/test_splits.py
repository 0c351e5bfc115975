"""The forget sets: the reference's examples, and every refusal."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from hamu_jax.data import FORGET_KINDS, make_split, validation_indices
from hamu_jax.errors import UserError

LABELS = np.repeat(np.arange(10), 10)
# No two examples are equally memorized: example 0 the most, example 99 the least.
SCORES = np.linspace(1, 0, 100)


@pytest.mark.parametrize("case", range(26))
def test_hard_probability_gives_the_reference_rows_in_its_order(golden, case):
  with np.load(golden / "hamu" / "data.npz") as data:
    labels = data["splits/train_labels"]
    retain, forget = data[f"splits/{case}/retain"], data[f"splits/{case}/forget"]
    rho, seed, *classes = data[f"splits/{case}/case"]
  split = make_split("hard_probability", labels, seed=int(seed), forget_class=classes, hard_probability=rho)
  np.testing.assert_array_equal(split.retain, retain)
  np.testing.assert_array_equal(split.forget, forget)


def test_class_forgets_exactly_the_rows_of_the_classes():
  split = make_split("class", LABELS, seed=0, forget_class=(3, 7))
  np.testing.assert_array_equal(split.forget, [*range(30, 40), *range(70, 80)])
  np.testing.assert_array_equal(split.retain, np.setdiff1d(np.arange(100), split.forget))


def test_random_forgets_the_share_and_depends_on_the_seed():
  first, again, other = (make_split("random", LABELS, seed=seed, forget_fraction=0.07) for seed in (1, 1, 2))
  assert len(first.forget) == 7
  np.testing.assert_array_equal(first.forget, again.forget)
  assert set(first.forget) != set(other.forget)


@pytest.mark.parametrize("kind, candidates", [("random_size", range(100)), ("class_size", [*range(30, 50)])])
def test_a_number_of_examples_is_drawn_from_all_or_from_the_classes(kind, candidates):
  def forget(seed, size):
    return make_split(kind, LABELS, seed=seed, forget_class=(3, 4), forget_size=size).forget.tolist()

  drawn = forget(1, 8)
  assert len(set(drawn)) == 8 and set(drawn) <= set(candidates)
  assert drawn == forget(1, 8) and drawn[:3] == forget(1, 3)
  assert set(drawn) != set(forget(2, 8))
  assert len(set(forget(1, 20))) == 20
  # Every candidate is drawn by some seed.
  assert set(candidates) == {each for seed in range(200) for each in forget(seed, 8)}


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
  seed=st.integers(0, 2**32),
  rho=st.floats(0, 1),
  duplicates=st.integers(0, 3),
  kind=st.sampled_from(["class", "hard_probability", "random", "random_size", "class_size"]),
)
def test_sets_partition_the_rows_and_duplicates_join_retain(seed, rho, duplicates, kind):
  split = make_split(
    kind,
    LABELS,
    seed=seed,
    forget_class=(4,),
    hard_probability=rho,
    forget_size=10,
    duplicates=duplicates,
  )
  counts = np.bincount(split.retain, minlength=100)
  is_forget = np.bincount(split.forget, minlength=100)
  np.testing.assert_array_equal(counts, np.where(is_forget, duplicates, 1))
  assert is_forget.max() == 1 and is_forget.sum() == 10


def test_rho_sets_how_many_of_the_class_are_certainly_kept():
  split = make_split("hard_probability", LABELS, seed=5, forget_class=(2,), hard_probability=0.6)
  assert (LABELS[split.forget[:4]] == 2).all()


@pytest.mark.parametrize(
  "level, expected",
  [
    ("high", [0, 1, 2, 3, 4]),
    ("low", [95, 96, 97, 98, 99]),
    ("mid", [49, 50, 48, 51, 47]),
    ("mixed", [0, 1, 49, 98, 99]),
  ],
)
def test_memorization_forgets_in_the_order_of_the_selection(level, expected):
  split = make_split("memorization", LABELS, seed=0, memorization_level=level, forget_size=5, scores=SCORES)
  np.testing.assert_array_equal(split.forget, expected)
  np.testing.assert_array_equal(split.retain, np.setdiff1d(np.arange(100), expected))


@pytest.mark.parametrize(
  "fraction, counts", [(0.1, [5, 1, 2, 0]), (0.5, [25, 3, 10, 1]), (0.0, [0, 0, 0, 0])]
)
def test_validation_takes_its_share_of_every_class(fraction, counts):
  labels = np.random.default_rng(0).permutation(np.repeat([0, 2, 3, 7], [50, 6, 20, 2]))
  indices = validation_indices(labels, fraction, seed=4)
  np.testing.assert_array_equal(np.bincount(labels[indices], minlength=8)[[0, 2, 3, 7]], counts)
  assert (np.diff(indices) > 0).all()
  np.testing.assert_array_equal(indices, validation_indices(labels, fraction, seed=4))
  if fraction:
    assert set(indices) != set(validation_indices(labels, fraction, seed=5))
    assert set(validation_indices(labels, 0.1, seed=4)) <= set(indices)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_validation_of_everything_or_less_than_nothing_is_refused(fraction):
  with pytest.raises(UserError, match=r"config.data.validation_fraction=.*in \[0, 1\)"):
    validation_indices(LABELS, fraction, seed=0)


def _write(path, indices):
  if path.suffix == ".npy":
    np.save(path, np.array(indices))
  elif path.suffix == ".npz":
    np.savez(path, forget=np.array(indices))
  elif path.suffix == ".json":
    path.write_text(json.dumps(indices))
  else:
    path.write_text("\n".join(map(str, indices)))
  return str(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".json", ".txt"])
def test_indices_are_read_from_every_format(tmp_path, suffix):
  path = _write(tmp_path / f"rows{suffix}", [42, 7, 99])
  split = make_split("indices", LABELS, seed=0, forget_indices=path)
  np.testing.assert_array_equal(split.forget, [42, 7, 99])
  np.testing.assert_array_equal(split.retain, np.setdiff1d(np.arange(100), [42, 7, 99]))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".json", ".txt"])
@pytest.mark.parametrize(
  "indices, message",
  [
    ([3, 100], "example 100 is outside the loaded training examples 0..99"),
    ([-1, 3], "example -1 is outside"),
    ([5, 6, 5], "example 5 is listed 2 times"),
    ([], "the forget set is empty"),
    ([0.5, 1.5], "needs one vector of integers|cannot be read"),
    (list(range(100)), "the retain set is empty"),
  ],
)
def test_indices_refuses_wrong_rows(tmp_path, suffix, indices, message):
  path = _write(tmp_path / f"rows{suffix}", indices)
  with pytest.raises(UserError, match=message):
    make_split("indices", LABELS, seed=0, forget_indices=path)


def test_indices_refuses_an_array_of_objects_unread(tmp_path):
  path = tmp_path / "rows.npy"
  with path.open("wb") as file:
    header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
    np.lib.format.write_array_header_1_0(file, header)
    file.write(b"any code could be here")
  with pytest.raises(UserError, match="Object arrays cannot be loaded"):
    make_split("indices", LABELS, seed=0, forget_indices=str(path))


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("rows.npz", b"PK\x03\x04 no archive", "cannot be read as example numbers"),
    ("rows.npy", b"", "cannot be read as example numbers"),
    ("rows.json", b"[1, 2", "cannot be read as example numbers"),
    ("rows.json", b"[true, false]", "needs one vector of integers"),
    ("rows.json", b'{"a": 1}', "needs one vector of integers"),
    ("rows.json", b"[[1, 2]]", r"holds int64 of shape \(1, 2\)"),
    ("rows.txt", b"1 two", "cannot be read as example numbers"),
    ("rows.txt", b"\xff\xfe", "cannot be read as example numbers"),
    ("rows.csv", b"1,2", "choose a file of type .npy, .npz, .json, .txt"),
  ],
)
def test_indices_refuses_unreadable_files(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    make_split("indices", LABELS, seed=0, forget_indices=str(path))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "kind, options, message",
  [
    ("klass", {}, "config.data.forget='klass': choose from class, hard_probability"),
    ("class", {"forget_class": (0, 12)}, "class 12 does not exist; choose from 0, 1, 2"),
    ("class", {"forget_class": ()}, "no class is chosen"),
    ("class", {"forget_class": tuple(range(10))}, "the retain set is empty"),
    ("hard_probability", {"hard_probability": 1.1}, r"choose a probability in \[0, 1\]"),
    ("hard_probability", {"hard_probability": float("nan")}, "choose a probability"),
    ("random", {"forget_fraction": 0.0}, "choose a share between 0 and 1"),
    ("random", {"forget_fraction": 1.0}, "choose a share between 0 and 1"),
    ("indices", {"forget_indices": "missing.npy"}, "no such file"),
    ("class", {"forget_class": (1,), "duplicates": -1}, "choose 0 or more"),
    ("memorization", {}, "but none are given: name a score file in config.data.scores"),
    ("memorization", {"scores": SCORES[:9]}, r"but \(9,\) are given for 100 examples"),
    (
      "memorization",
      {"scores": SCORES, "memorization_level": "medium"},
      "config.data.memorization_level='medium': choose from high, mid, low, mixed",
    ),
    (
      "memorization",
      {"scores": SCORES, "forget_size": 0},
      "config.data.forget_size=0: there are 100 training examples, so choose 1..99",
    ),
    ("memorization", {"scores": SCORES, "forget_size": 100}, "choose 1..99"),
    (
      "random_size",
      {"forget_size": 100},
      "config.data.forget_size=100: there are 100 training examples, so choose 1..99",
    ),
    (
      "class_size",
      {"forget_size": 21, "forget_class": (3, 4)},
      r"config.data.forget_size=21: forget_class \(3, 4\) has 20 training examples, so choose 1..20",
    ),
    ("class_size", {"forget_size": 0, "forget_class": (3,)}, "choose 1..10"),
    ("class_size", {"forget_size": 3, "forget_class": (12,)}, "class 12 does not exist"),
  ],
)
def test_bad_requests_are_one_clear_line(kind, options, message):
  with pytest.raises(UserError, match=message) as error:
    make_split(kind, LABELS, seed=0, **options)
  assert "\n" not in str(error.value)


def test_every_kind_is_exercised_here():
  assert set(FORGET_KINDS) == {
    "class",
    "hard_probability",
    "random",
    "random_size",
    "class_size",
    "indices",
    "memorization",
    "separate",
  }
