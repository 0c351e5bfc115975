"""Comparisons of made-up run directories, against NumPy and brute force."""

import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hamu_jax.config import default as config_lib
from hamu_jax.errors import UserError
from hamu_jax.report import gather
from hamu_jax.run import rundir


def _config(**fields):
  """The resolved default configuration on the digits; fields as section__name."""
  config = config_lib.default_config()
  config.data.source, config.data.name = "digits", ""
  with config.unlocked():
    for field, value in fields.items():
      *sections, name = field.split("__")
      place = config
      for section in sections:
        place = place[section]
      place[name] = value
  return rundir.jsonable(config.to_dict())


def _write(path, *, unlearned=0.5, original=0.9, finished=True, rows=(), torn="", data="d" * 64, **fields):
  """A run directory whose accuracies are the given numbers."""
  path.mkdir(parents=True)
  rundir.write_json(path / "config.json", _config(**fields))
  (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
  if finished:

    def result(accuracy):
      return {split: {"accuracy": accuracy, "loss": 1.0} for split in ("retain", "forget", "test")}

    rundir.write_json(
      path / "summary.json",
      {
        "method": "any",
        "steps": 4,
        "stop_reason": "finished after 4 applied steps",
        "results": {"original": result(original), "unlearned": result(unlearned)},
        "seconds": {"pretrain": 3.0, "unlearn": 2.0},
        "provenance": {"device": "cpu", "devices": 1, "data_fingerprint": data},
      },
    )
  return path


def _step(step, **values):
  return {"stage": "unlearn", "step": step, "split": "step", **values}


def _study(*paths):
  (study,) = gather.studies(gather.gather(paths).runs)
  return study


# Means and deviations


def test_estimates_are_numpys_over_seeds(tmp_path):
  accuracies = [0.31, 0.42, 0.38]
  for seed, accuracy in zip((41, 42, 43), accuracies):
    _write(tmp_path / str(seed), unlearned=accuracy, seed=seed, data__seed=seed)
  (group,) = _study(tmp_path).groups
  estimate = group.columns["forget.accuracy"]
  assert estimate.count == 3
  assert estimate.mean == pytest.approx(np.mean(accuracies))
  assert estimate.std == pytest.approx(np.std(accuracies, ddof=1))


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8))
def test_estimates_are_numpys(numbers):
  mean, std, count = gather.estimates({"a": number} for number in numbers)["a"]
  np.testing.assert_allclose([mean, std, count], [np.mean(numbers), np.std(numbers, ddof=1), len(numbers)])


def test_one_seed_has_no_deviation_and_a_missing_value_is_not_counted():
  found = gather.estimates([{"a": 2.0, "b": 1.0}, {"b": 3.0}])
  assert found["a"].mean == 2 and math.isnan(found["a"].std) and found["a"].count == 1
  assert found["b"] == (2.0, math.sqrt(2), 2)


def test_a_seed_that_diverged_is_not_left_out_in_silence(tmp_path):
  for seed, accuracy in ((1, 0.5), (2, None)):
    _write(tmp_path / str(seed), unlearned=accuracy, seed=seed)
  (group,) = _study(tmp_path).groups
  assert math.isnan(group.columns["test.accuracy"].mean)
  assert group.columns["test.loss"].mean == 1.0


def test_timing_is_of_the_last_stage(tmp_path):
  (group,) = _study(_write(tmp_path / "run")).groups
  assert group.runs[0].timing == {
    "seconds.pretrain": 3.0,
    "seconds.unlearn": 2.0,
    "steps": 4.0,
    "seconds": 2.0,
    "seconds_per_step": 0.5,
  }


# Groups


def test_runs_are_grouped_by_all_that_differs_but_seeds_and_names(tmp_path):
  for ratio in (0.1, 0.5):
    for seed in (1, 2):
      # A name that lies about what is inside.
      _write(
        tmp_path / f"ft-{ratio}-{seed}",
        unlearned=ratio + seed / 100,
        seed=seed,
        method__name="hamu-q",
        method__constraint_ratio=ratio,
        stage_cache=f"cache{seed}",
      )
  study = _study(tmp_path)
  assert study.fields == study.shown == ("method.name", "method.constraint_ratio")
  assert [group.settings for group in study.groups] == [
    {"method.name": "hamu-q", "method.constraint_ratio": ratio} for ratio in (0.1, 0.5)
  ]
  means = [group.columns["test.accuracy"].mean for group in study.groups]
  np.testing.assert_allclose(means, [0.115, 0.515])


def test_fields_that_follow_from_the_method_are_not_shown(tmp_path):
  for name, epochs in (("ft", 5.0), ("ga", 10.0)):
    for rho in (0.0, 0.1):
      _write(tmp_path / f"{name}{rho}", method__name=name, method__epochs=epochs, sam__rho=rho)
  study = _study(tmp_path)
  assert set(study.fields) == {"method.name", "method.epochs", "sam.rho"}
  assert study.shown == ("method.name", "sam.rho")
  assert study.title(study.groups[1].settings, study.shown) == "ft, sam.rho 0.1"


def test_methods_on_different_problems_are_kept_apart(tmp_path):
  _write(tmp_path / "a", method__name="ft", data__hard_probability=0.0)
  _write(tmp_path / "b", method__name="ga", data__hard_probability=0.5)
  study = _study(tmp_path)
  assert study.problem_fields == ("data.hard_probability",)
  assert len(study.problems()) == 2


def test_fields_of_later_versions_have_their_defaults(tmp_path):
  _write(tmp_path / "new", seed=1)
  _write(tmp_path / "old", seed=2)
  config = rundir.read_json(tmp_path / "old" / "config.json")
  del config["text"], config["method"]["layer"]
  rundir.write_json(tmp_path / "old" / "config.json", config)
  (group,) = _study(tmp_path).groups
  assert len(group.runs) == 2


def test_a_repeated_run_is_no_seed(tmp_path):
  _write(tmp_path / "a", unlearned=0.4, seed=1)
  _write(tmp_path / "b", unlearned=0.4, seed=1)
  _write(tmp_path / "c", unlearned=0.5, seed=1)
  runs, notes = gather.gather([tmp_path])
  assert [run.path.name for run in runs] == ["a"]
  assert len(notes) == 2 and "has the configuration and seeds of" in notes[0]
  assert "though other results" not in notes[0] and "though other results" in notes[1]


def test_a_finished_run_stands_for_its_unfinished_repeat(tmp_path):
  _write(tmp_path / "a", finished=False, data="")
  _write(tmp_path / "b", finished=False)
  runs, _ = gather.gather([tmp_path / "b", tmp_path])
  assert [run.path.name for run in runs] == ["b"]


def test_references_count_each_seed_once(tmp_path):
  for name in ("ft", "ga", "gru"):
    for seed, accuracy in ((1, 0.8), (2, 0.9)):
      _write(tmp_path / f"{name}{seed}", original=accuracy, method__name=name, seed=seed)
  (reference,) = _study(tmp_path).references
  assert reference.model == "original"
  assert reference.columns["test.accuracy"] == (pytest.approx(0.85), pytest.approx(math.sqrt(0.005)), 2)


def test_a_reference_does_not_count_again_for_each_seed_of_unlearning(tmp_path):
  for seed in (1, 2):
    for unlearning in (None, 7, 8):
      _write(tmp_path / f"{seed}-{unlearning}", original=0.1 * seed, seed=seed, method__seed=unlearning)
  (reference,) = _study(tmp_path).references
  assert reference.columns["test.accuracy"].count == 2
  (group,) = _study(tmp_path).groups
  assert len(group.runs) == 6


def test_deviations_are_those_of_one_seed_alone(tmp_path):
  accuracies = np.array([[0.1, 0.2, 0.4], [0.5, 0.9, 0.6]])
  for i, seed in enumerate((41, 42)):
    for j, unlearning in enumerate((1, 2, 3)):
      _write(
        tmp_path / f"{i}{j}",
        unlearned=float(accuracies[i, j]),
        seed=seed,
        method__seed=unlearning,
        data__seed=0,
      )
  # One that shares a cell with no other.
  _write(tmp_path / "lonely", unlearned=0.7, seed=50, method__seed=50, data__seed=0)
  (group,) = _study(tmp_path).groups
  found = gather.deviations(group)
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
    _write(tmp_path / str(name), unlearned=accuracy, seed=seed, method__seed=unlearning)
  (group,) = _study(tmp_path).groups
  found = gather.deviations(group)["method.seed"]["retain.accuracy"]
  assert found.mean == pytest.approx(math.sqrt((0.02 + 0.18) / 3)) and found.count == 5


def test_sweeps_vary_one_field_alone(tmp_path):
  for ratio in (0.9, 0.1, 0.5):
    for seed in (1, 2):
      _write(tmp_path / f"q{ratio}{seed}", unlearned=ratio, seed=seed, method__constraint_ratio=ratio)
  _write(tmp_path / "ft", method__name="ft", method__constraint_ratio=0.2)
  found = gather.sweeps(_study(tmp_path))
  assert list(found) == ["method.constraint_ratio"]
  (series,) = found["method.constraint_ratio"]
  assert series.x == (0.1, 0.5, 0.9) and series.settings == {"method.name": "hamu-q"}
  assert [group.columns["test.accuracy"].mean for group in series.groups] == [0.1, 0.5, 0.9]


# Pareto fronts


@given(
  st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12),
  st.tuples(st.booleans(), st.booleans()),
)
def test_pareto_is_what_nothing_beats(points, larger):
  def gains(point):
    return [value if more else -value for value, more in zip(point, larger)]

  def beats(a, b):
    return all(x >= y for x, y in zip(gains(a), gains(b))) and gains(a) != gains(b)

  front = gather.pareto(np.array(points), larger=larger)
  expected = {i for i, point in enumerate(points) if not any(beats(other, point) for other in points)}
  assert set(front.tolist()) == expected and len(front) == len(expected)
  assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_pareto_leaves_out_what_is_not_finite():
  points = np.array([[np.nan, 9.0], [1.0, 1.0], [2.0, np.nan]])
  assert gather.pareto(points, larger=(False, True)).tolist() == [1]
  assert gather.pareto(np.zeros((0, 2)), larger=(True, True)).size == 0


# Diagnostics


def test_over_steps_joins_the_tensors_of_all_seeds_at_common_steps(tmp_path):
  angles = np.random.default_rng(0).uniform(0, 180, (2, 4, 3))
  for seed, length in ((0, 4), (1, 3)):
    rows = [_step(step + 1, angle=angles[seed, step].tolist()) for step in range(length)]
    _write(tmp_path / str(seed), rows=rows, seed=seed)
  (group,) = _study(tmp_path).groups
  steps, values = gather.over_steps(group, "angle")
  assert steps.tolist() == [1, 2, 3]
  np.testing.assert_allclose(values, np.concatenate(angles[:, :3], axis=1))
  assert gather.over_steps(group, "branch") is None


# Broken and unfinished


def test_a_half_finished_run_says_how_far_it_got(tmp_path):
  rows = [{"stage": "pretrain", "step": 9, "split": "step"}, _step(7, retain_loss=1.0)]
  _write(tmp_path / "half", finished=False, rows=rows, seed=1)
  _write(tmp_path / "new", finished=False, seed=2)
  _write(tmp_path / "whole", seed=3)
  study = _study(tmp_path)
  assert [run.status for run in study.runs] == [
    "unfinished: unlearn step 7",
    "unfinished: no step yet",
    "finished",
  ]
  (group,) = study.groups
  assert [run.path.name for run in group.runs] == ["whole"]


def test_nothing_but_unfinished_runs_is_still_a_study(tmp_path):
  _write(tmp_path / "a", finished=False, method__name="ft")
  _write(tmp_path / "b", finished=False, method__name="ga")
  study = _study(tmp_path)
  assert study.groups == () and len(study.runs) == 2


def test_a_torn_line_is_reported_and_the_rest_used(tmp_path):
  rows = [_step(step, angle=[10.0 * step]) for step in (1, 2)]
  _write(tmp_path / "run", rows=rows, torn='{"stage": "unlearn", "step": 3, "an')
  (run,), (note,) = gather.gather([tmp_path])
  assert "metrics.jsonl is truncated: its 2 whole lines are used" in note
  assert run.reached == ("unlearn", 2)
  assert run.diagnostics["angle"][1].tolist() == [[10.0], [20.0]]


@pytest.mark.parametrize(
  "name, text, said",
  (
    ("metrics.jsonl", "{\n{}\n", "line 1 is not JSON"),
    ("metrics.jsonl", '{"step": 1}\n7\n', "2 lines are not rows"),
    ("summary.json", "{", "summary.json is not JSON"),
    ("summary.json", "[]", "summary.json has no results"),
  ),
)
def test_what_is_broken_is_noted_and_left_out(tmp_path, name, text, said):
  (_write(tmp_path / "run") / name).write_text(text)
  (run,), (note,) = gather.gather([tmp_path])
  assert said in note and ("left out" in note or "shown as unfinished" in note)
  assert run.status == ("finished" if name == "metrics.jsonl" else "unfinished: no step yet")


def test_a_config_of_something_else_is_no_run(tmp_path):
  run = _write(tmp_path / "run")
  for folder, text in (("unlearned", '{"architectures": ["Llama"]}'), ("x", "[1]"), ("broken", "{")):
    (run / folder).mkdir()
    (run / folder / "config.json").write_text(text)
  runs, notes = gather.gather([tmp_path, run])
  assert [found.path for found in runs] == [run]
  assert len(notes) == 1 and "broken/config.json is not JSON" in notes[0]


def test_nowhere_and_nothing_are_one_line(tmp_path):
  with pytest.raises(UserError, match="missing: no such folder"):
    gather.gather([tmp_path / "missing"])
  with pytest.raises(UserError, match="no run directory there"):
    gather.gather([tmp_path])


# Datasets


def test_different_data_are_refused_with_the_reason(tmp_path):
  _write(tmp_path / "a")
  _write(tmp_path / "b", data="e" * 64)
  runs = gather.gather([tmp_path]).runs
  with pytest.raises(UserError, match="data_fingerprint is dddddddd there and eeeeeeee here.*--by-dataset"):
    gather.studies(runs)
  assert [study.label for study in gather.studies(runs, by_dataset=True)] == [
    "digits, data dddddddd",
    "digits, data eeeeeeee",
  ]
  shutil.rmtree(tmp_path / "b")
  _write(tmp_path / "c", data="e" * 64, data__source="tfds", data__name="cifar10")
  runs = gather.gather([tmp_path]).runs
  with pytest.raises(UserError, match="config.data.source is 'digits' there and 'tfds' here") as error:
    gather.studies(runs)
  assert "\n" not in str(error.value)
  assert [study.label for study in gather.studies(runs, by_dataset=True)] == ["digits", "tfds, cifar10"]


def test_the_same_contents_from_another_source_are_the_same_data(tmp_path):
  _write(tmp_path / "a", seed=1, data__source="parquet", data__path="here")
  _write(tmp_path / "b", seed=2, data__source="tfds", data__name="cifar10")
  (group,) = _study(tmp_path).groups
  assert len(group.runs) == 2


def test_seeds_of_a_subset_are_one_dataset(tmp_path):
  for seed in (1, 2):
    _write(tmp_path / str(seed), seed=seed, data__seed=seed, data__train_size=500, data=str(seed) * 64)
  (group,) = _study(tmp_path).groups
  assert len(group.runs) == 2


def test_other_texts_to_forget_of_one_source_are_one_dataset(tmp_path):
  for split in ("forget05", "forget10"):
    _write(
      tmp_path / split,
      model__name="llama",
      data__source="tofu",
      text__forget_split=split,
      data=split.ljust(64),
    )
  study = _study(tmp_path)
  assert study.problem_fields == ("text.forget_split",)


def test_an_unfinished_run_joins_the_data_of_its_section(tmp_path):
  _write(tmp_path / "a")
  _write(tmp_path / "b", data="e" * 64, data__path="elsewhere")
  _write(tmp_path / "c", finished=False, data__path="elsewhere")
  by_label = gather.datasets(gather.gather([tmp_path]).runs)
  assert [[run.path.name for run in runs] for runs in by_label.values()] == [["a"], ["b", "c"]]
