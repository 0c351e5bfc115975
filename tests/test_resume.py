"""Killed runs: whatever the moment, running the command again ends bit-identical."""

import json
import pathlib
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

# A checkpoint after every chunk, so that there is always one being written or just written.
EAGER = ["--config.checkpoint_seconds=0", "--config.method.epochs=4"]


def final(workdir: pathlib.Path):
  weights = load_file(workdir / "unlearned.safetensors")
  results = json.loads((workdir / "summary.json").read_text())["results"]
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
  steps = [(row["stage"], row["step"], row["split"]) for row in rows]
  return weights, results, steps


def assert_same(workdir, wanted):
  weights, results, steps = final(workdir)
  assert weights.keys() == wanted[0].keys()
  for name, tensor in weights.items():
    np.testing.assert_array_equal(tensor, wanted[0][name], err_msg=name)
  assert results == wanted[1]
  assert sorted(steps) == sorted(wanted[2])


@pytest.fixture
def uninterrupted(small, launch, tmp_path):
  process = launch(small("whole", *EAGER))
  assert process.wait(300) == 0, process.stdout.read()
  return final(tmp_path / "whole")


def wait_for(condition, process, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition():
    if process.poll() is not None or time.monotonic() > deadline:
      return False
    time.sleep(0.002)
  return True


def stage_has_checkpoint(workdir, stage):
  return lambda: any(path.name.isdigit() for path in (workdir / "checkpoints").glob(f"{stage}-*/*"))


def checkpoint_in_the_making(workdir, stage):
  return lambda: any("tmp" in path.name for path in (workdir / "checkpoints").glob(f"{stage}-*/*"))


@pytest.mark.slow
def test_killed_at_any_point_and_rerun_ends_the_same(small, launch, tmp_path, uninterrupted):
  workdir = tmp_path / "killed"
  arguments = small("killed", *EAGER)
  seed = int(np.random.default_rng().integers(2**31))
  print(f"moments drawn with seed {seed}")
  rng = np.random.default_rng(seed)
  # While a checkpoint is written, then at moments that nothing but chance has chosen.
  moments = [
    (checkpoint_in_the_making(workdir, "pretrain"), 0.0),
    (checkpoint_in_the_making(workdir, "unlearn"), 0.0),
    (stage_has_checkpoint(workdir, "unlearn"), rng.uniform(0, 0.5)),
    (lambda: workdir.exists(), rng.uniform(0, 10)),
  ]
  kills = 0
  for moment, delay in moments:
    process = launch(arguments)
    if wait_for(moment, process):
      time.sleep(delay)
      process.kill()
      kills += 1
    process.wait()
    assert process.returncode in (0, -signal.SIGKILL)
  assert kills >= 2
  process = launch(arguments)
  assert process.wait(300) == 0, process.stdout.read()
  assert_same(workdir, uninterrupted)


def test_sigterm_saves_and_exits_in_time(small, launch, tmp_path, uninterrupted):
  workdir = tmp_path / "terminated"
  # No periodic checkpoint: what is there afterwards was saved because of the signal.
  arguments = small("terminated", "--config.method.epochs=4", "--config.checkpoint_seconds=10000")
  process = launch(arguments)
  log = workdir / "metrics.jsonl"
  assert wait_for(lambda: log.exists() and '"step": 1,' in log.read_text(), process)
  process.send_signal(signal.SIGTERM)
  asked = time.monotonic()
  assert process.wait(60) == 128 + signal.SIGTERM
  assert time.monotonic() - asked < 10
  assert "run the same command to resume" in process.stdout.read()
  assert stage_has_checkpoint(workdir, "pretrain")()

  process = launch(arguments)
  assert process.wait(300) == 0, process.stdout.read()
  assert_same(workdir, uninterrupted)
