"""The run-directory contract: atomic, strict, resumable, and one clear line when it cannot be."""

import fcntl
import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.errors import UserError
from hamu_jax.run import rundir
from hamu_jax.run.rundir import RunDir, jsonable, read_json, read_metrics

CONFIG = {"method": {"name": "hamu-q", "ratio": 0.5}, "seed": 41, "wandb": {"project": ""}}


@pytest.fixture
def run(tmp_path):
  run = RunDir.open(tmp_path / "run", CONFIG)
  yield run
  run.close()


def _strict(text):
  """Parses JSON as the standard has it: NaN and Infinity are errors."""

  def refuse(token):
    raise AssertionError(f"{token} is not JSON")

  return json.loads(text, parse_constant=refuse)


# Values


def test_values_of_every_kind_become_plain_json():
  value = {
    "numpy": np.float32(0.5),
    "count": np.int64(3),
    "flag": np.bool_(True),
    "none": None,
    "jax": jnp.arange(3),
    "matrix": np.eye(2),
    "bfloat16": jnp.array([1.5], jnp.bfloat16),
    "tuple": (1, "a"),
    "path": pathlib.Path("a/b"),
    7: "key",
  }
  assert _strict(json.dumps(jsonable(value))) == {
    "numpy": 0.5,
    "count": 3,
    "flag": True,
    "none": None,
    "jax": [0, 1, 2],
    "matrix": [[1.0, 0.0], [0.0, 1.0]],
    "bfloat16": [1.5],
    "tuple": [1, "a"],
    "path": "a/b",
    "7": "key",
  }


def test_what_is_not_a_number_is_null(run):
  run.write(
    "unlearn",
    1,
    "step",
    {"loss": float("nan"), "angle": np.array([1.0, np.inf]), "norm": jnp.float32(-np.inf)},
  )
  row = _strict((run.path / "metrics.jsonl").read_text())
  assert (row["loss"], row["angle"], row["norm"]) == (None, [1.0, None], None)
  run.write_json("summary.json", {"results": {"loss": np.float64("nan")}})
  assert _strict((run.path / "summary.json").read_text()) == {"results": {"loss": None}}


def test_unknown_kinds_are_refused():
  with pytest.raises(TypeError, match="object"):
    jsonable({"x": object()})


# Metrics


def test_rows_come_back_in_order(run):
  run.write("pretrain", 10, "test", {"accuracy": 0.5, "loss": np.float32(0.25)})
  run.write("unlearn", np.int32(1), "step", {"angle": [90.0, 45.0], "branch": np.array([0, 4])})
  assert read_metrics(run.path) == (
    [
      {"stage": "pretrain", "step": 10, "split": "test", "accuracy": 0.5, "loss": 0.25},
      {"stage": "unlearn", "step": 1, "split": "step", "angle": [90.0, 45.0], "branch": [0, 4]},
    ],
    False,
    0,
  )


def test_every_row_is_on_disk_at_once(run):
  """A kill -9 right after `write` loses nothing: there is no buffer in the process."""
  run.write("unlearn", 1, "step", {"loss": 1.0})
  assert len(read_metrics(run.path / "metrics.jsonl").rows) == 1


def test_values_may_not_shadow_the_row(run):
  with pytest.raises(ValueError, match="step"):
    run.write("unlearn", 1, "retain", {"step": 3})


def test_no_file_means_no_rows(tmp_path):
  assert read_metrics(tmp_path) == ([], False, 0)
  assert read_metrics(tmp_path / "metrics.jsonl") == ([], False, 0)


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_torn_last_line_is_reported_and_removed_when_the_run_reopens(run, cut):
  run.write("unlearn", 1, "step", {"loss": 1.0})
  whole = (run.path / "metrics.jsonl").read_bytes()
  run.write("unlearn", 2, "step", {"loss": 2.0})
  run.close()
  os.truncate(run.path / "metrics.jsonl", len(whole) + cut)
  rows, torn, _ = read_metrics(run.path)
  assert torn and [row["step"] for row in rows] == [1]

  again = RunDir.open(run.path, CONFIG)
  assert (run.path / "metrics.jsonl").read_bytes() == whole
  again.write("unlearn", 2, "step", {"loss": 3.0})
  again.close()
  rows, torn, _ = read_metrics(run.path)
  assert not torn and [row["loss"] for row in rows] == [1.0, 3.0]


def test_whole_last_line_without_its_newline_is_kept(run):
  run.write("unlearn", 1, "step", {"loss": 1.0})
  path = run.path / "metrics.jsonl"
  os.truncate(path, path.stat().st_size - 1)
  again = RunDir.open(run.path, CONFIG)
  again.write("unlearn", 2, "step", {"loss": 2.0})
  assert [row["step"] for row in read_metrics(run.path).rows] == [1, 2]


ROW = '{"stage": "unlearn", "step": 1, "split": "step"}\n'


@pytest.mark.parametrize(
  "garbage",
  [
    "not json",
    "{}",
    "7",
    "[" * 100_000,
    "\0\r\x85",
    '{"stage": "unlearn", "step": "1", "split": "step"}',
    "NaN",
  ],
)
def test_lines_that_are_no_rows_are_left_out_and_a_copy_kept(run, capsys, garbage):
  run.close()
  content = f"{ROW}{garbage}\n{ROW}".encode("latin-1")
  (run.path / "metrics.jsonl").write_bytes(content)
  log = read_metrics(run.path)
  assert (len(log.rows), log.torn, log.damaged) == (2, False, 1)
  RunDir.open(run.path, CONFIG).close()
  assert (run.path / "metrics.jsonl").read_text() == ROW + ROW
  assert (run.path / "metrics.jsonl.damaged-1").read_bytes() == content
  assert "1 lines are no rows" in capsys.readouterr().err


def test_rows_that_are_lost_are_restored_as_far_as_they_are_known(run, capsys):
  known = {"last": {"loss": 0.5}, "evaluation": {"test": {"accuracy": 1.0}, "auc": 0.25}, "evaluated": 3}
  run.restore("unlearn", 5, **known)
  assert read_metrics(run.path).rows == [
    {"stage": "unlearn", "step": 5, "split": "step", "loss": 0.5},
    {"stage": "unlearn", "step": 3, "split": "test", "accuracy": 1.0},
    {"stage": "unlearn", "step": 3, "split": "evaluation", "auc": 0.25},
  ]
  assert "no rows of unlearn: those of its 5 steps are gone" in capsys.readouterr().err
  run.restore("unlearn", 5, **known)
  assert len(read_metrics(run.path).rows) == 3 and not capsys.readouterr().err


def test_a_directory_is_of_one_process_at_a_time(tmp_path):
  other = tmp_path / "run" / ".lock"
  other.parent.mkdir()
  with open(other, "w") as file:
    file.write("process 7 on elsewhere")
    file.flush()
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="run is in use by process 7 on elsewhere; wait .*another --workdir"):
      RunDir.open(tmp_path / "run", CONFIG)
    assert not (tmp_path / "run" / "config.json").exists()
  # The process has ended, its name is still there.
  run = RunDir.open(tmp_path / "run", CONFIG)
  assert f"process {os.getpid()} on" in other.read_text()
  run.close()


def test_truncate_drops_only_the_stage_beyond_the_step(run):
  for stage, step, split in (
    ("pretrain", 90, "test"),
    ("unlearn", 5, "step"),
    ("unlearn", 10, "step"),
    ("unlearn", 10, "retain"),
    ("unlearn", 11, "step"),
    ("retrain", 50, "test"),
  ):
    run.write(stage, step, split, {"loss": 1.0})
  run.truncate("unlearn", 10)
  # The append handle of before must not write into the replaced file.
  run.write("unlearn", 11, "step", {"loss": 2.0})
  rows = [(row["stage"], row["step"], row["loss"]) for row in read_metrics(run.path).rows]
  assert rows == [
    ("pretrain", 90, 1.0),
    ("unlearn", 5, 1.0),
    ("unlearn", 10, 1.0),
    ("unlearn", 10, 1.0),
    ("retrain", 50, 1.0),
    ("unlearn", 11, 2.0),
  ]
  run.truncate("unlearn", -1)
  assert {row["stage"] for row in read_metrics(run.path).rows} == {"pretrain", "retrain"}


def test_truncate_drops_evaluations_that_are_repeated(run):
  for step, split in ((4, "retain"), (5, "step"), (6, "step"), (6, "retain"), (7, "step")):
    run.write("unlearn", step, split, {"loss": 1.0})
  run.truncate("unlearn", 6, evaluated=4)
  rows = [(row["step"], row["split"]) for row in read_metrics(run.path).rows]
  assert rows == [(4, "retain"), (5, "step"), (6, "step")]


def test_truncate_keeps_the_other_lines_byte_for_byte(run):
  run.write("pretrain", 1, "test", {"loss": np.float32(0.1), "tiny": 1e-300, "text": "é\u2028"})
  before = (run.path / "metrics.jsonl").read_bytes()
  run.write("unlearn", 1, "step", {"loss": 1.0})
  run.truncate("unlearn", 0)
  assert (run.path / "metrics.jsonl").read_bytes() == before


# Atomic writes


@pytest.mark.parametrize("killed_in", ("fsync", "replace"))
def test_a_killed_write_leaves_the_old_json(run, monkeypatch, killed_in):
  class Killed(BaseException):
    pass

  def die(*_):
    raise Killed

  run.write_json("summary.json", {"steps": 1})
  with monkeypatch.context() as patch:
    patch.setattr(rundir.os, killed_in, die)
    with pytest.raises(Killed):
      run.write_json("summary.json", {"steps": 2, "results": list(range(1000))})
  assert read_json(run.path / "summary.json") == {"steps": 1}
  run.write_json("summary.json", {"steps": 3})
  assert read_json(run.path / "summary.json") == {"steps": 3}
  assert not [path for path in os.listdir(run.path) if path.endswith(".partial")]


def test_a_killed_truncate_keeps_every_row(run, monkeypatch):
  for step in range(3):
    run.write("unlearn", step, "step", {"loss": 1.0})
  with monkeypatch.context() as patch:
    patch.setattr(rundir.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      run.truncate("unlearn", 0)
  assert len(read_metrics(run.path).rows) == 3


# Whose directory it is


def test_the_same_experiment_reopens(run):
  assert read_json(run.path / "config.json") == CONFIG
  RunDir.open(run.path, {**CONFIG, "seed": np.int64(41)})


def test_another_experiment_is_refused_with_both_values(run):
  other = {**CONFIG, "method": {"name": "ga", "ratio": 0.5}}
  with pytest.raises(UserError) as caught:
    RunDir.open(run.path, other)
  message = str(caught.value)
  assert 'config.method.name is "hamu-q" there and "ga" here' in message
  assert str(run.path) in message and "another --workdir" in message and "delete" in message
  assert "ratio" not in message and "\n" not in message
  assert read_json(run.path / "config.json") == CONFIG


def test_fields_that_exist_on_one_side_only_differ(run):
  with pytest.raises(UserError, match="config.method.ratio is 0.5 there and absent here"):
    RunDir.open(run.path, {**CONFIG, "method": {"name": "hamu-q"}})
  with pytest.raises(UserError, match="config.new is absent there and null here"):
    RunDir.open(run.path, {**CONFIG, "new": None})


def test_many_differences_are_counted(run):
  with pytest.raises(UserError, match="and 2 more fields differ"):
    RunDir.open(run.path, {**CONFIG, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5})


def test_ignored_fields_and_sections_may_differ(run):
  other = {**CONFIG, "seed": 42, "wandb": {"project": "", "name": "x"}}
  RunDir.open(run.path, other, ignore=("wandb", "seed"))
  assert read_json(run.path / "config.json") == other
  with pytest.raises(UserError, match="config.seedling"):
    RunDir.open(run.path, {**other, "seedling": 1}, ignore=("seed",))


def test_broken_config_is_one_line(run):
  (run.path / "config.json").write_text("{")
  with pytest.raises(UserError, match=r"config.json: cannot be read as JSON .*--workdir"):
    RunDir.open(run.path, CONFIG)


def test_missing_json_names_the_file(tmp_path):
  with pytest.raises(UserError, match="summary.json does not exist"):
    read_json(tmp_path / "summary.json")


# What cannot be written


def test_full_disk_is_one_line(run):
  (run.path / "metrics.jsonl").symlink_to("/dev/full")
  with pytest.raises(UserError, match="metrics.jsonl: No space left on device; make room"):
    run.write("unlearn", 1, "step", {"loss": 1.0})


def test_full_disk_under_a_json_file(run):
  (run.path / ".summary.json.partial").symlink_to("/dev/full")
  with pytest.raises(UserError, match="summary.json.*: No space left on device"):
    run.write_json("summary.json", {"steps": 1})


def test_workdir_below_a_file_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write .*file.*choose another --workdir"):
    RunDir.open(tmp_path / "file" / "run", CONFIG)
  with pytest.raises(UserError, match="cannot write .*file.*choose another --workdir"):
    RunDir.open(tmp_path / "file", CONFIG)


def test_unreadable_workdir_is_one_line(tmp_path, monkeypatch):
  def deny(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(pathlib.Path, "exists", deny)
  with pytest.raises(UserError, match="run.*: Permission denied; .*another --workdir"):
    RunDir.open(tmp_path / "run", CONFIG)


# One writer


def test_other_hosts_write_nothing(tmp_path):
  run = RunDir.open(tmp_path / "run", CONFIG, writer=False)
  run.write("unlearn", 1, "step", {"loss": 1.0})
  run.truncate("unlearn", 0)
  run.write_json("summary.json", {})
  run.close()
  assert not (tmp_path / "run").exists()


def test_other_hosts_refuse_another_experiment_too(run):
  with pytest.raises(UserError, match="another experiment"):
    RunDir.open(run.path, {**CONFIG, "seed": 1}, writer=False)


def test_arrays_are_replaced_whole(tmp_path, monkeypatch):
  path = tmp_path / "split.npz"
  rundir.write_arrays(path, retain=np.arange(3))
  rundir.write_arrays(path, retain=np.arange(5), forget=np.array([7]))
  with np.load(path, allow_pickle=False) as archive:
    assert {name: archive[name].tolist() for name in archive} == {"retain": [0, 1, 2, 3, 4], "forget": [7]}

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(rundir.os, "replace", full)
  with pytest.raises(UserError, match="split.npz: No space left"):
    rundir.write_arrays(path, retain=np.arange(9))
  with np.load(path, allow_pickle=False) as archive:
    assert archive["retain"].size == 5


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
  (tmp_path / "summary.json").write_text("mine")
  with pytest.raises(
    UserError, match="is not a run directory: it holds 'summary.json'.*choose another --workdir"
  ):
    rundir.RunDir.open(tmp_path, {"seed": 1})
  assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
  assert (tmp_path / "summary.json").read_text() == "mine"


@pytest.mark.parametrize("name", ["output.txt", "hardness.json", ".DS_Store"])
def test_what_sweeps_and_previews_leave_is_no_obstacle(tmp_path, name):
  (tmp_path / name).touch()
  rundir.RunDir.open(tmp_path, {"seed": 1}).close()
  assert (tmp_path / "config.json").exists()
