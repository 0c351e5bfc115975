"""Groups and studies of made-up run directories, against NumPy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hamu_jax.report import study as study_lib
from tests.report import directories


def test_estimates_are_numpys_over_seeds(tmp_path):
  accuracies = [0.31, 0.42, 0.38]
  for seed, accuracy in zip((41, 42, 43), accuracies):
    directories.write(tmp_path / str(seed), unlearned=accuracy, seed=seed, data__seed=seed)
  (group,) = directories.study(tmp_path).groups
  estimate = group.columns["forget.accuracy"]
  assert estimate.count == 3
  assert estimate.mean == pytest.approx(np.mean(accuracies))
  assert estimate.std == pytest.approx(np.std(accuracies, ddof=1))


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8))
def test_estimates_are_numpys(numbers):
  mean, std, count = study_lib.estimates({"a": number} for number in numbers)["a"]
  np.testing.assert_allclose([mean, std, count], [np.mean(numbers), np.std(numbers, ddof=1), len(numbers)])


def test_one_seed_has_no_deviation_and_a_missing_value_is_not_counted():
  found = study_lib.estimates([{"a": 2.0, "b": 1.0}, {"b": 3.0}])
  assert found["a"].mean == 2 and math.isnan(found["a"].std) and found["a"].count == 1
  assert found["b"] == (2.0, math.sqrt(2), 2)


def test_a_seed_that_diverged_is_not_left_out_in_silence(tmp_path):
  for seed, accuracy in ((1, 0.5), (2, None)):
    directories.write(tmp_path / str(seed), unlearned=accuracy, seed=seed)
  (group,) = directories.study(tmp_path).groups
  assert math.isnan(group.columns["test.accuracy"].mean)
  assert group.columns["test.loss"].mean == 1.0


def test_runs_are_grouped_by_all_that_differs_but_seeds_and_names(tmp_path):
  for ratio in (0.1, 0.5):
    for seed in (1, 2):
      # A name that lies about what is inside.
      directories.write(
        tmp_path / f"ft-{ratio}-{seed}",
        unlearned=ratio + seed / 100,
        seed=seed,
        method__name="hamu-q",
        method__constraint_ratio=ratio,
        stage_cache=f"cache{seed}",
      )
  study = directories.study(tmp_path)
  assert study.fields == study.shown == ("method.name", "method.constraint_ratio")
  assert [group.settings for group in study.groups] == [
    {"method.name": "hamu-q", "method.constraint_ratio": ratio} for ratio in (0.1, 0.5)
  ]
  means = [group.columns["test.accuracy"].mean for group in study.groups]
  np.testing.assert_allclose(means, [0.115, 0.515])


def test_fields_that_follow_from_the_method_are_not_shown(tmp_path):
  for name, epochs in (("ft", 5.0), ("ga", 10.0)):
    for rho in (0.0, 0.1):
      directories.write(tmp_path / f"{name}{rho}", method__name=name, method__epochs=epochs, sam__rho=rho)
  study = directories.study(tmp_path)
  assert set(study.fields) == {"method.name", "method.epochs", "sam.rho"}
  assert study.shown == ("method.name", "sam.rho")
  assert study.title(study.groups[1].settings, study.shown) == "ft, sam.rho 0.1"


def test_methods_on_different_tasks_are_kept_apart(tmp_path):
  directories.write(tmp_path / "a", method__name="ft", data__hard_probability=0.0)
  directories.write(tmp_path / "b", method__name="ga", data__hard_probability=0.5)
  study = directories.study(tmp_path)
  assert study.task_fields == ("data.hard_probability",)
  assert len(study.by_task()) == 2


def test_references_count_each_seed_once(tmp_path):
  for name in ("ft", "ga", "gru"):
    for seed, accuracy in ((1, 0.8), (2, 0.9)):
      directories.write(tmp_path / f"{name}{seed}", original=accuracy, method__name=name, seed=seed)
  (reference,) = directories.study(tmp_path).references
  assert reference.model == "original"
  assert reference.columns["test.accuracy"] == (pytest.approx(0.85), pytest.approx(math.sqrt(0.005)), 2)


def test_a_reference_does_not_count_again_for_each_seed_of_unlearning(tmp_path):
  for seed in (1, 2):
    for unlearning in (None, 7, 8):
      directories.write(
        tmp_path / f"{seed}-{unlearning}", original=0.1 * seed, seed=seed, method__seed=unlearning
      )
  (reference,) = directories.study(tmp_path).references
  assert reference.columns["test.accuracy"].count == 2
  (group,) = directories.study(tmp_path).groups
  assert len(group.runs) == 6


def test_deviations_are_those_of_one_seed_alone(tmp_path):
  accuracies = np.array([[0.1, 0.2, 0.4], [0.5, 0.9, 0.6]])
  for i, seed in enumerate((41, 42)):
    for j, unlearning in enumerate((1, 2, 3)):
      directories.write(
        tmp_path / f"{i}{j}",
        unlearned=float(accuracies[i, j]),
        seed=seed,
        method__seed=unlearning,
        data__seed=0,
      )
  # One that shares a cell with no other.
  directories.write(tmp_path / "lonely", unlearned=0.7, seed=50, method__seed=50, data__seed=0)
  (group,) = directories.study(tmp_path).groups
  found = study_lib.deviations(group)
  assert found.keys() == {"seed", "method.seed"}
  wanted = {
    "seed": np.sqrt(accuracies.var(0, ddof=1).mean()),
    "method.seed": np.sqrt(accuracies.var(1, ddof=1).mean()),
  }
  for field, value in wanted.items():
    mean, std, count = found[field]["forget.accuracy"]
    assert mean == pytest.approx(value) and math.isnan(std) and count == 6
    assert found[field]["forget.loss"].mean == 0


def test_cells_of_several_sizes_are_weighed_by_their_degrees_of_freedom(tmp_path):
  for name, (seed, unlearning, accuracy) in enumerate(
    [(1, 1, 0.2), (1, 2, 0.4), (2, 1, 0.1), (2, 2, 0.4), (2, 3, 0.7)]
  ):
    directories.write(tmp_path / str(name), unlearned=accuracy, seed=seed, method__seed=unlearning)
  (group,) = directories.study(tmp_path).groups
  found = study_lib.deviations(group)["method.seed"]["retain.accuracy"]
  assert found.mean == pytest.approx(math.sqrt((0.02 + 0.18) / 3)) and found.count == 5


def test_sweeps_vary_one_field_alone(tmp_path):
  for ratio in (0.9, 0.1, 0.5):
    for seed in (1, 2):
      directories.write(
        tmp_path / f"q{ratio}{seed}", unlearned=ratio, seed=seed, method__constraint_ratio=ratio
      )
  directories.write(tmp_path / "ft", method__name="ft", method__constraint_ratio=0.2)
  found = study_lib.sweeps(directories.study(tmp_path))
  assert list(found) == ["method.constraint_ratio"]
  (series,) = found["method.constraint_ratio"]
  assert series.x == (0.1, 0.5, 0.9) and series.settings == {"method.name": "hamu-q"}
  assert [group.columns["test.accuracy"].mean for group in series.groups] == [0.1, 0.5, 0.9]


def test_over_steps_joins_the_tensors_of_all_seeds_at_common_steps(tmp_path):
  angles = np.random.default_rng(0).uniform(0, 180, (2, 4, 3))
  for seed, length in ((0, 4), (1, 3)):
    rows = [directories.step(step + 1, angle=angles[seed, step].tolist()) for step in range(length)]
    directories.write(tmp_path / str(seed), rows=rows, seed=seed)
  (group,) = directories.study(tmp_path).groups
  steps, values = study_lib.over_steps(group, "angle")
  assert steps.tolist() == [1, 2, 3]
  np.testing.assert_allclose(values, np.concatenate(angles[:, :3], axis=1))
  assert study_lib.over_steps(group, "branch") is None


def test_nothing_but_unfinished_runs_is_still_a_study(tmp_path):
  directories.write(tmp_path / "a", finished=False, method__name="ft")
  directories.write(tmp_path / "b", finished=False, method__name="ga")
  study = directories.study(tmp_path)
  assert study.groups == () and len(study.runs) == 2
