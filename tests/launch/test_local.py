"""Running a sweep: what starts when, what is skipped, and what happens when processes end badly."""

import collections
import fcntl
import pathlib
import re
import subprocess
import sys
import threading
import time

import pytest

from hamu_jax.errors import UserError
from hamu_jax.launch import local
from hamu_jax.run import preemption

METHODS = ["gdiff", "hamu-q", "hamu-u"]


class NoSignal:
  """A watch that notices nothing."""

  requested = False


def run(members, workdir, jobs=1, chosen=None, watch=NoSignal):
  return local.Runner(members, workdir, jobs, watch).run(
    [(member,) for member in (members if chosen is None else chosen)]
  )


@pytest.fixture
def workdir(tmp_path):
  return tmp_path / "run"


@pytest.mark.parametrize("jobs", [1, 2, 4, 20])
def test_no_stage_is_computed_twice(members_of, stand_in, workdir, jobs, capsys):
  # Pretraining is shared by a seed, retraining by a seed and a class.
  members = members_of(
    {"method.name": METHODS, "seed": [41, 42], "data.forget_class": [(0,), (1,)]},
    set={"train.select": "last"},
  )
  assert run(members, workdir, jobs) == []
  log = stand_in()
  computed = [row[1] for row in log if row[0] == "compute"]
  assert len(computed) == len(set(computed))
  assert collections.Counter(name.split("-")[0] for name in computed) == {"pretrain": 2, "retrain": 4}
  at_work = most = 0
  for row in log:
    at_work += (row[0] == "start") - (row[0] == "end")
    most = max(most, at_work)
  assert most <= jobs
  # The seeds' first ones run together.
  assert most >= min(jobs, 2)
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(members) == 12
  assert [line.split("]")[0] for line in lines] == [f"[{n:2}/12" for n in range(1, 13)]
  shown = re.compile(r"finished after 1 applied steps; retain 50\.0 %; \d+ s")
  assert all(map(shown.search, lines))


def test_what_is_done_is_skipped(members_of, stand_in, workdir, capsys):
  members = members_of({"method.name": METHODS})
  assert run(members, workdir, chosen=members[:1]) == []
  assert run(members, workdir) == []
  started = [row[1] for row in stand_in() if row[0] == "start"]
  assert started == METHODS
  assert "[1/3] gdiff: was done before" in capsys.readouterr().out
  # A run that did not come to its end is not.
  (workdir / "gdiff" / "summary.json").unlink()
  assert run(members, workdir) == []
  assert [row[1] for row in stand_in() if row[0] == "start"] == [*METHODS, "gdiff"]


def test_a_cache_emptied_since_is_filled_by_one(members_of, stand_in, workdir):
  members = members_of({"method.name": METHODS})
  run(members, workdir, chosen=members[:1])
  for folder in (workdir / "stages").glob("*train-*"):
    folder.rmdir()
  run(members, workdir, jobs=2)
  computed = [row[1].split("-")[0] for row in stand_in() if row[0] == "compute"]
  assert computed == ["pretrain", "retrain"] * 2


@pytest.mark.parametrize(
  ("what", "reason"), [("kill", "killed by signal 9"), ("fail", "exit status 2; error: told to fail")]
)
def test_failures_are_named_and_made_good(members_of, stand_in, workdir, what, reason, capsys):
  members = members_of({"method.name": METHODS, "seed": [41, 42]})
  first = workdir / members[0].name
  first.mkdir(parents=True)
  (first / what).touch()
  (failure,) = run(members, workdir, jobs=2)
  assert failure.name == members[0].name
  assert failure.reason.startswith(reason)
  assert str(first / "output.txt") in failure.reason
  assert f"{members[0].name}: FAILED: {reason}" in capsys.readouterr().out
  # The others did not wait for the stage forever, and still none made it beside another.
  assert sum(member_done(workdir, member) for member in members) == 5
  computed = collections.Counter(row[1] for row in stand_in() if row[0] == "compute")
  assert sorted(computed.values()) == [1, 1, 1, 2]
  assert run(members, workdir, jobs=2) == []
  assert all(member_done(workdir, member) for member in members)


def member_done(workdir, member):
  return (workdir / member.name / "summary.json").exists()


def test_processes_of_a_killed_runner_are_waited_for(members_of, stand_in, workdir, capsys):
  """They keep their locks, and what they do is not done twice."""
  members = members_of({"method.name": METHODS})
  (workdir / "locks").mkdir(parents=True)
  with open(workdir / "locks" / "gdiff", "ab") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"], pass_fds=[lock.fileno()])
  started = time.monotonic()
  assert run(members[:1], workdir) == []
  assert time.monotonic() - started > 0.8
  assert "waiting for another process that is running gdiff" in capsys.readouterr().out
  assert orphan.wait() == 0


def test_another_runner_respects_what_is_at_work(members_of, stand_in, workdir):
  members = members_of({"method.name": METHODS})
  (workdir / "gdiff").mkdir(parents=True)
  (workdir / "gdiff" / "sleep").touch()
  watch = NoSignal()
  # A second runner, which does not know the first.
  others = []

  def second():
    while not any(row[0] == "asleep" for row in stand_in()):
      time.sleep(0.01)
    other = local.Runner(members, workdir, 1, watch)
    others.extend([other._lock(members[:1]), other._lock(members[1:2])])
    watch.requested = True

  thread = threading.Thread(target=second)
  thread.start()
  with pytest.raises(preemption.Preempted):
    run(members, workdir, watch=watch)
  thread.join()
  # Neither the member itself nor another one that needs the same stage.
  assert others == [None, None]
  # Asked to end, it could say goodbye.
  assert stand_in()[-1] == ["terminated", "gdiff"]


def test_two_runners_share_the_work(members_of, stand_in, workdir):
  members = members_of({"method.name": METHODS, "seed": [41, 42]})
  threads = [threading.Thread(target=run, args=(members, workdir, 2)) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  log = stand_in()
  for what, count in (("start", 6), ("compute", 4), ("end", 6)):
    rows = [row[1] for row in log if row[0] == what]
    assert len(rows) == len(set(rows)) == count


def test_a_run_directory_of_another_experiment_is_refused(members_of, stand_in, workdir):
  run(members_of({"method.name": METHODS}), workdir)
  members = members_of({"method.name": METHODS}, set={"train.epochs": 2})
  with pytest.raises(UserError, match="belongs to another experiment.*train.epochs is 1 there and 2 here"):
    local.is_done(members[0], workdir)


def test_a_workdir_that_cannot_be_written_is_named(members_of, stand_in, tmp_path):
  members = members_of({"method.name": METHODS})
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="cannot write .*file/run/locks/gdiff"):
    run(members, tmp_path / "file" / "run")


@pytest.mark.parametrize(
  ("jobs", "devices", "wanted", "fraction"),
  [
    (1, "0123", [None], None),
    (2, "", [None, None], None),
    (2, "0123", ["0,2", "1,3"], None),
    (3, "0123", ["0,3", "1", "2"], None),
    (4, "01", ["0", "1", "0", "1"], "0.375"),
    (3, "01", ["0", "1", "0"], "0.375"),
  ],
)
def test_jobs_share_out_the_gpus(jobs, devices, wanted, fraction):
  environments = [local.share_devices(slot, jobs, list(devices)) for slot in range(jobs)]
  assert [environment.get("CUDA_VISIBLE_DEVICES") for environment in environments] == wanted
  assert {environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION") for environment in environments} == {fraction}


def test_jobs_at_a_time_have_different_gpus(members_of, stand_in, workdir, monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
  run(members_of({"method.name": METHODS, "seed": [41, 42]}), workdir, jobs=2)
  holders = {}
  for row in stand_in():
    if row[0] == "start":
      assert row[2] not in holders.values()
      holders[row[1]] = row[2]
    elif row[0] == "end":
      assert holders.pop(row[1]) in ("2", "5")


def test_gpus_are_found(monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
  assert local.find_devices() == []
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
  there = [pathlib.Path(f"/dev/nvidia{number}") for number in (1, 0)]
  monkeypatch.setattr(pathlib.Path, "glob", lambda *_: there)
  assert local.find_devices() == ["0", "1"]


def test_members_that_differ_in_settings_and_seeds_are_grouped(members_of):
  members = members_of(
    {"method.name": METHODS, "method.optimizer.learning_rate": [0.1, 0.2], "seed": [41, 42]}
  )
  groups = local.group(members, 3)
  assert [len(group) for group in groups] == [3, 1] * len(METHODS)
  for group in groups:
    assert len({member.config.method.name for member in group}) == 1
  assert sorted(member.name for group in groups for member in group) == sorted(
    member.name for member in members
  )


def test_the_command_of_a_group_has_all_its_members(members_of, workdir):
  members = members_of({"seed": [41, 42]})
  python, *command = local.command(members, workdir)
  assert command[:2] == ["-m", "hamu_jax.together"]
  split = command.index("--")
  for member, part in zip(members, (command[2:split], command[split + 1 :]), strict=True):
    assert part == [*member.arguments, f"--workdir={workdir / member.name}"]


def test_a_group_is_one_process(members_of, stand_in, workdir, capsys):
  members = members_of({"method.optimizer.learning_rate": [0.1, 0.2, 0.3], "seed": [41, 42]})
  groups = local.group(members, 4)
  watch = NoSignal()
  assert local.Runner(members, workdir, 1, watch).run(groups) == []
  output = capsys.readouterr().out
  assert output.count("for 4 together") == 4 and output.count("for 2 together") == 2
  assert output.splitlines()[-1].startswith("[6/6] ")
  # No stage twice, although both groups need the same.
  computed = [row[1] for row in stand_in() if row[0] == "compute"]
  assert len(computed) == len(set(computed)) == 4
  assert local.Runner(members, workdir, 1, watch).run(groups) == []
  assert capsys.readouterr().out.count("was done before") == 6


def test_what_is_done_of_a_group_that_fails_counts(members_of, stand_in, workdir, capsys):
  members = members_of({"seed": [41, 42]})
  (group,) = local.group(members, 2)
  (workdir / members[1].name).mkdir(parents=True)
  (workdir / members[1].name / "fail").touch()
  (failure,) = local.Runner(members, workdir, 1, NoSignal()).run([group])
  assert failure.name == members[1].name
  assert failure.reason.startswith("exit status 2; error: told to fail")
  assert local.Runner(members, workdir, 1, NoSignal()).run([group]) == []
  assert "was done before" in capsys.readouterr().out
