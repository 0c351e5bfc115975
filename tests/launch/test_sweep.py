"""The command line of sweeps, on real experiments where it takes no more than seconds."""

import json
import os
import pathlib
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from hamu_jax.launch import sweep
from tests.arguments import replaced

ROOT = pathlib.Path(__file__).parent.parent.parent
GRID = {"method.name": ["gdiff", "hamu-q"], "seed": [41, 42]}


def run(*arguments):
  return sweep.run(["launch.sweep", *arguments])


@pytest.fixture
def options(sweep_file, tmp_path):
  """-> function: the command line of a small sweep in a workdir under tmp_path."""
  return lambda grid=GRID, workdir="run", **block: [
    f"--config={sweep_file(grid, **block)}",
    f"--workdir={tmp_path / workdir}",
  ]


def results(workdir):
  """What the members of a sweep found out, by name."""
  return {
    folder.name: (
      json.loads((folder / "summary.json").read_text())["results"],
      load_file(folder / "unlearned.safetensors"),
    )
    for folder in (path.parent for path in workdir.glob("*/summary.json"))
  }


def trained(workdir):
  """The members that pretrained or retrained something themselves, by stage and seed."""
  found = {}
  for path in workdir.glob("*/metrics.jsonl"):
    seed = json.loads((path.parent / "config.json").read_text())["seed"]
    for stage in {json.loads(line)["stage"] for line in path.open()} - {"unlearn", "evaluate"}:
      found.setdefault((stage, seed), []).append(path.parent.name)
  return found


def test_a_sweep_runs_and_a_second_time_has_nothing_to_do(options, tmp_path, capsys):
  assert run(*options(), "--jobs=2", "--filter=seed=41") == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 3
  line = r"\[1/2\] gdiff,seed=41: finished after 1 applied steps; retain [\d.]+ %, .*tug of war"
  assert re.match(line, lines[0])
  assert re.match(r"\[2/2\] hamu-q,seed=41: ", lines[1])
  assert lines[2] == f"2 of 2 members are done; everything is in {tmp_path / 'run'}"
  assert trained(tmp_path / "run") == {
    ("pretrain", 41): ["gdiff,seed=41"],
    ("retrain", 41): ["gdiff,seed=41"],
  }
  found = results(tmp_path / "run")
  assert found.keys() == {"gdiff,seed=41", "hamu-q,seed=41"}
  first, second = (result for result, _ in found.values())
  assert first["original"] == second["original"]
  assert first["retrained"] == second["retrained"]

  assert run(*options(), "--filter=seed=41") == 0
  assert capsys.readouterr().out.count("was done before") == 2
  # Those left are what the other engines take.
  assert run(*options(), "--engine=print") == 0
  assert [line.split("seed=")[1][:2] for line in capsys.readouterr().out.splitlines()] == ["42", "42"]


def test_printed_commands_are_those_that_run(options, tmp_path, capsys):
  grid = {"method.name": ["gdiff"], "data.forget_class": [(0, 1)]}
  assert run(*options(grid), "--engine=print", "--config.train.epochs=3") == 0
  (line,) = capsys.readouterr().out.splitlines()
  # The sweep's own train.epochs gives way: no field is given twice.
  assert shlex.split(line) == [
    sys.executable,
    "-m",
    "hamu_jax.main",
    "--config=configs/digits_hamu.py",
    "--config.model.name=mlp",
    "--config.method.max_steps=1",
    "--config.method.batch_size=64",
    "--config.method.name=gdiff",
    "--config.data.forget_class=(0, 1)",
    "--config.train.epochs=3",
    f"--config.stage_cache={tmp_path / 'run' / 'stages'}",
    f"--workdir={tmp_path / 'run'}/gdiff,forget_class=(0,_1)",
  ]
  assert not (tmp_path / "run").exists()


def test_the_stage_cache_can_be_another(options, capsys):
  assert run(*options(), "--engine=print", "--config.stage_cache=elsewhere") == 0
  assert capsys.readouterr().out.count("--config.stage_cache=") == 4
  assert run(*options(), "--engine=print", "--config.stage_cache=elsewhere") == 0
  assert capsys.readouterr().out.count("--config.stage_cache=elsewhere") == 4
  # Members always share one.
  assert run(*options(), "--engine=print", "--config.stage_cache=") == 0
  assert capsys.readouterr().out.count("/run/stages") == 4


def test_failures_are_listed_at_the_end(options, stand_in, tmp_path, capsys):
  (tmp_path / "run" / "gdiff,seed=41").mkdir(parents=True)
  (tmp_path / "run" / "gdiff,seed=41" / "kill").touch()
  assert run(*options()) == 1
  output = capsys.readouterr()
  assert output.err.startswith("failed: gdiff,seed=41: killed by signal 9")
  assert len(output.err.splitlines()) == 1
  assert output.out.splitlines()[-1].startswith("3 of 4 members are done")
  assert run(*options()) == 0


BAD_INPUT = {
  "a line break in the workdir": (["--workdir=run\nrm"], r"--workdir='run\\nrm': holds unprintable"),
  "an empty workdir": (["--workdir="], "--workdir=: is empty; give a folder, or leave"),
  "a workdir in a file": (
    ["--workdir=/dev/null/run"],
    "--workdir=.*/dev/null is not a folder; choose another",
  ),
  "a line break in the name": (["--config=a\nrm.py"], r"--config='a\\nrm.py': holds unprintable"),
  "jobs without end": (
    ["--jobs=99999999999"],
    "--jobs=99999999999: must be at least 1 and at most 2147483647",
  ),
  "no sweep": (["--config=configs/sweeps/nope.py"], "nope.py: no such sweep; in configs/sweeps"),
  "an experiment": (["--config=configs/digits_hamu.py"], r"has no get_sweep\(\); run a single experiment"),
  "unknown field": (["--config.method.nmae=ft"], "config.method.nmae: no such field; the nearest is"),
  "unknown option": (["--jbos=2"], "'--jbos=2': not understood"),
  "not a field": (["--config.seed"], "'--config.seed': not understood; fields are given as"),
  "no number": (["--jobs=many"], "argument --jobs: invalid int value: 'many'"),
  "no jobs": (["--jobs=0"], "--jobs=0: must be at least 1"),
  "engine": (["--engine=slrum"], "choose from local, vmap, slurm, print .did you mean 'slurm'"),
  "together": (["--together=2"], "--together=2: only --engine=vmap trains members together"),
  "none together": (["--engine=vmap", "--together=0"], "--together=0: must be at least 1"),
  "filter": (["--filter=nothing"], "--filter=nothing: matches none of the 4 members.*gdiff,seed=41"),
  "expression": (["--filter=("], r"--filter=\(: not a regular expression"),
  "quotes": (["--engine=slurm", "--sbatch=--time='1 2"], "--sbatch=--time='1 2: its quotes are not balanced"),
  "twice": (["--config.train.epochs=1", "--config.train.epochs=2"], "--config.train.epochs: is given twice"),
  "varied": (["--config.seed=5"], "--config.seed=5: the sweep varies seed"),
  "invalid": (["--config.train.epochs=0"], "gdiff,seed=41: config.train.epochs=0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line_and_status_2(options, tmp_path, capsys, arguments, message):
  assert run(*replaced(options(), *arguments)) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ")
  assert len(error.splitlines()) == 1
  assert re.search(message, error), error
  assert not (tmp_path / "run").exists()


def test_duplicates_get_one_line_and_status_2(options, capsys):
  assert run(*options({"method.optimizer.learning_rate": [0.1, 0.1]})) == 2
  assert "two members are called 'learning_rate=0.1'" in capsys.readouterr().err


def test_a_config_is_required(capsys):
  assert run("--jobs=2") == 2
  assert "error: the following arguments are required: --config; see" in capsys.readouterr().err


def test_a_workdir_of_another_sweep_is_refused_before_anything_runs(options, stand_in, tmp_path, capsys):
  assert run(*options(), "--filter=hamu-q,seed=42") == 0
  assert run(*options(), "--config.train.epochs=2") == 2
  error = capsys.readouterr().err
  assert "hamu-q,seed=42 belongs to another experiment: config.train.epochs is 1 there and 2 here" in error
  assert [row for row in stand_in() if row[0] == "start"] == [["start", "hamu-q,seed=42", None]]
  # What changes no result may differ.
  assert run(*options(), "--config.checkpoint_seconds=1") == 0


def test_a_sweep_of_the_package_runs_from_any_folder(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert (
    run("--config=hamu_jax:sweeps/cifar_seeds:digits", "--engine=print", "--filter=^gdiff,seed=41,.*=1$") == 0
  )
  (command,) = capsys.readouterr().out.splitlines()
  assert "--config=hamu_jax:digits_hamu" in command
  assert "--workdir=runs/cifar_seeds/gdiff," in command


def test_a_clone_has_the_program_under_its_short_name():
  process = start(["--help"])
  assert process.wait(60) == 0
  assert process.stdout.read() == f"{sweep.__doc__}\n"


def test_help(capsys):
  assert run("--help") == 0
  assert "--engine=ENGINE" in capsys.readouterr().out


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
  """Puts a stand-in for sbatch on the path; -> function: its command lines."""
  folder = tmp_path / "bin"
  folder.mkdir()
  (folder / "sbatch").write_text(
    f'#!/bin/bash\nprintf "%q " "$@" >> {folder}/calls\necho >> {folder}/calls\n'
    'if [[ -n ${REFUSE:-} ]]; then echo "sbatch: error: $REFUSE" >&2; exit 1; fi\n'
    'echo "Submitted batch job 7"\n'
  )
  (folder / "sbatch").chmod(0o755)
  monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
  return lambda: [shlex.split(line) for line in (folder / "calls").open()]


def directives(script):
  return dict(
    line.removeprefix("#SBATCH --").partition("=")[::2]
    for line in script.read_text().splitlines()
    if line.startswith("#SBATCH")
  )


def test_slurm_submits_one_job_array(options, sbatch, tmp_path, capsys, monkeypatch):
  # A python that says what it was asked for, in place of this one.
  recorder = tmp_path / "re corder"
  recorder.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
  recorder.chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(recorder))
  arguments = ["--engine=slurm", "--sbatch=--partition=gpu --time='1 2'", "--jobs=3"]
  assert run(*options(), *arguments, "--config.train.batch_size=100") == 0
  assert "Submitted batch job 7: 4 members, one a task" in capsys.readouterr().out
  ((*given, script),) = sbatch()
  assert given == ["--partition=gpu", "--time=1 2"]
  script = pathlib.Path(script)
  found = directives(script)
  assert found["array"] == "0-3%3"
  assert found["output"] == f"{tmp_path}/run/slurm/%A_%a.txt"
  assert "requeue" in found

  names = []
  for task in range(4):
    done = subprocess.run(
      ["bash", script],
      env=os.environ | {"SLURM_ARRAY_TASK_ID": str(task)},
      cwd="/",
      capture_output=True,
      text=True,
      check=True,
    )
    module, name, *given = done.stdout.splitlines()
    assert (module, name) == ("-m", "hamu_jax.launch.sweep")
    # What the task runs is exactly one member, with the override.
    assert run(*replaced(given, "--engine=print")) == 0
    (command,) = capsys.readouterr().out.splitlines()
    assert "--config.train.batch_size=100" in command
    names.append(pathlib.Path(shlex.split(command)[-1]).name)
  # First those that make what the others need.
  assert names == ["gdiff,seed=41", "gdiff,seed=42", "hamu-q,seed=41", "hamu-q,seed=42"]


def test_slurm_takes_what_is_left(options, sbatch, stand_in, tmp_path, capsys):
  assert run(*options(), "--filter=seed=41") == 0
  assert run(*options(), "--engine=slurm") == 0
  assert directives(pathlib.Path(sbatch()[0][-1]))["array"] == "0-1"
  assert run(*options()) == 0
  capsys.readouterr()
  assert run(*options(), "--engine=slurm") == 0
  assert "all 4 members are done" in capsys.readouterr().out
  assert len(sbatch()) == 1


def test_slurm_that_refuses_is_quoted(options, sbatch, capsys, monkeypatch):
  monkeypatch.setenv("REFUSE", "invalid partition specified")
  assert run(*options(), "--engine=slurm") == 2
  error = capsys.readouterr().err
  assert len(error.splitlines()) == 1
  assert "failed: sbatch: error: invalid partition specified" in error


def test_slurm_that_is_not_there_is_named(options, capsys, monkeypatch):
  monkeypatch.setenv("PATH", "/nowhere")
  assert run(*options(), "--engine=slurm") == 2
  assert "sbatch is not installed here" in capsys.readouterr().err


def start(arguments):
  return subprocess.Popen(
    [sys.executable, "-m", "launch.sweep", *arguments],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for(condition, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def processes_in(workdir):
  """Ids of the members' processes."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      command = path.read_bytes().decode().split("\0")
    except OSError:
      continue
    if "hamu_jax.main" in command and any(f"--workdir={workdir}/" in part for part in command):
      found.append(int(path.parent.name))
  return found


def assert_same(found, wanted):
  assert found.keys() == wanted.keys()
  for name, (values, weights) in found.items():
    assert values == wanted[name][0], name
    for tensor in weights:
      np.testing.assert_array_equal(weights[tensor], wanted[name][1][tensor])


# Long enough to be killed in the middle.
EAGER = {"train.epochs": 4, "train.evaluate_epochs": 1.0, "method.max_steps": 20, "checkpoint_seconds": 0.0}


@pytest.mark.slow
def test_killed_at_any_point_and_rerun_ends_the_same(options, tmp_path):
  whole, killed = options(set=EAGER, workdir="whole"), options(set=EAGER, workdir="killed")
  assert start([*whole, "--jobs=2"]).wait(600) == 0
  workdir = tmp_path / "killed"
  seed = random.randrange(2**31)
  print(f"moments drawn with seed {seed}")
  rng = random.Random(seed)
  process = start([*killed, "--jobs=2"])
  wait_for(lambda: list(workdir.glob("*/metrics.jsonl")))
  os.kill(processes_in(workdir)[0], signal.SIGKILL)
  assert process.wait(600) == 1
  assert "killed by signal 9" in process.stdout.read()
  # A member that is drawn may be at its very end, so that these may leave nothing to be reported.
  for victim in ("runner", "child", "runner"):
    process = start([*killed, "--jobs=2"])
    wait_for(lambda: processes_in(workdir) or process.poll() is not None)
    time.sleep(rng.uniform(0, 12))
    if process.poll() is not None:
      break
    children = processes_in(workdir)
    if victim == "runner":
      process.kill()
      assert process.wait() == -signal.SIGKILL
    elif children:
      os.kill(rng.choice(children), signal.SIGKILL)
      assert process.wait(600) in (0, 1)
  process = start([*killed, "--jobs=2"])
  assert process.wait(600) == 0, process.stdout.read()
  wanted = results(tmp_path / "whole")
  assert len(wanted) == 4
  assert_same(results(workdir), wanted)


@pytest.mark.slow
def test_sigterm_reaches_the_members_and_the_same_command_goes_on(options, tmp_path):
  arguments = [*options(set=EAGER), "--jobs=2"]
  workdir = tmp_path / "run"
  process = start(arguments)
  wait_for(lambda: len(list(workdir.glob("*/metrics.jsonl"))) == 2)
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 128 + signal.SIGTERM
  assert "run the same command to resume" in process.stdout.read()
  assert processes_in(workdir) == []
  process = start(arguments)
  assert process.wait(600) == 0, process.stdout.read()


@pytest.mark.slow
def test_tasks_of_a_job_array_share_stages(options, sbatch, tmp_path):
  assert run(*options(), "--engine=slurm") == 0
  script = sbatch()[0][-1]
  tasks = [
    subprocess.Popen(["bash", script], env=os.environ | {"SLURM_ARRAY_TASK_ID": str(task)})
    for task in range(4)
  ]
  assert [task.wait(600) for task in tasks] == [0] * 4
  assert len(results(tmp_path / "run")) == 4
  assert {stage: len(members) for stage, members in trained(tmp_path / "run").items()} == {
    (stage, seed): 1 for stage in ("pretrain", "retrain") for seed in (41, 42)
  }
