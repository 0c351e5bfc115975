"""Made-up run directories, whole, broken and unfinished, as they are read."""

import pytest

from hamu_jax.report import gather
from hamu_jax.run import rundir
from tests.report import directories


def test_timing_is_of_the_last_stage(tmp_path):
  (group,) = directories.study(directories.write(tmp_path / "run")).groups
  assert group.runs[0].timing == {
    "seconds.pretrain": 3.0,
    "seconds.unlearn": 2.0,
    "steps": 4.0,
    "seconds": 2.0,
    "seconds_per_step": 0.5,
  }


def test_fields_of_later_versions_have_their_defaults(tmp_path):
  directories.write(tmp_path / "new", seed=1)
  directories.write(tmp_path / "old", seed=2)
  config = rundir.read_json(tmp_path / "old" / "config.json")
  del config["text"], config["method"]["layer"]
  rundir.write_json(tmp_path / "old" / "config.json", config)
  (group,) = directories.study(tmp_path).groups
  assert len(group.runs) == 2


def test_a_repeated_run_is_no_seed(tmp_path):
  directories.write(tmp_path / "a", unlearned=0.4, seed=1)
  directories.write(tmp_path / "b", unlearned=0.4, seed=1)
  directories.write(tmp_path / "c", unlearned=0.5, seed=1)
  runs, notes = gather.gather([tmp_path])
  assert [run.path.name for run in runs] == ["a"]
  assert len(notes) == 2 and "has the configuration and seeds of" in notes[0]
  assert "but different results" not in notes[0] and "but different results" in notes[1]


def test_a_finished_run_stands_for_its_unfinished_repeat(tmp_path):
  directories.write(tmp_path / "a", finished=False, data="")
  directories.write(tmp_path / "b", finished=False)
  runs, _ = gather.gather([tmp_path / "b", tmp_path])
  assert [run.path.name for run in runs] == ["b"]


def test_a_half_finished_run_says_how_far_it_got(tmp_path):
  rows = [{"stage": "pretrain", "step": 9, "split": "step"}, directories.step(7, retain_loss=1.0)]
  directories.write(tmp_path / "half", finished=False, rows=rows, seed=1)
  directories.write(tmp_path / "new", finished=False, seed=2)
  directories.write(tmp_path / "whole", seed=3)
  study = directories.study(tmp_path)
  assert [run.status for run in study.runs] == [
    "unfinished: unlearn step 7",
    "unfinished: no step yet",
    "finished",
  ]
  (group,) = study.groups
  assert [run.path.name for run in group.runs] == ["whole"]


def test_a_torn_line_is_reported_and_the_rest_used(tmp_path):
  rows = [directories.step(step, angle=[10.0 * step]) for step in (1, 2)]
  directories.write(tmp_path / "run", rows=rows, torn='{"stage": "unlearn", "step": 3, "an')
  (run,), (note,) = gather.gather([tmp_path])
  assert "metrics.jsonl is truncated: its 2 complete lines are used" in note
  assert run.reached == ("unlearn", 2)
  assert run.diagnostics["angle"][1].tolist() == [[10.0], [20.0]]


@pytest.mark.parametrize(
  "name, text, said",
  (
    ("metrics.jsonl", "{\n{}\n7", "3 lines are not rows"),
    ("metrics.jsonl", "\0\xff" * 100, "1 lines are not rows"),
    ("metrics.jsonl", '{"step": 1}\n7\n', "2 lines are not rows"),
    ("summary.json", "{", "summary.json: cannot be read as JSON"),
    ("summary.json", "[]", "summary.json: holds a JSON list"),
  ),
)
def test_what_is_broken_is_noted_and_left_out(tmp_path, name, text, said):
  (directories.write(tmp_path / "run") / name).write_text(text)
  (run,), (note,) = gather.gather([tmp_path])
  assert said in note and ("left out" in note or "shown as unfinished" in note)
  assert run.status == ("finished" if name == "metrics.jsonl" else "unfinished: no step yet")


def test_a_config_of_something_else_is_no_run(tmp_path):
  run = directories.write(tmp_path / "run")
  for folder, text in (("unlearned", '{"architectures": ["Llama"]}'), ("x", "[1]"), ("broken", "{")):
    (run / folder).mkdir()
    (run / folder / "config.json").write_text(text)
  runs, notes = gather.gather([tmp_path, run])
  assert [found.path for found in runs] == [run]
  assert (
    len(notes) == 2
    and "broken/config.json: cannot be read as JSON" in notes[0]
    and "x/config.json: holds a JSON list" in notes[1]
  )
