"""Small sweeps, and a stand-in for `hamu_jax.main` that is done in no time."""

import json
import pathlib
import sys

import pytest

from hamu_jax.launch import expand, local
from hamu_jax.run import rundir

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def sweep_file(tmp_path, monkeypatch):
  """-> function: writes a sweep of the digits on a multilayer perceptron, and gives its path."""
  monkeypatch.chdir(ROOT)
  small = {"model.name": "mlp", "train.epochs": 1, "method.max_steps": 1, "method.batch_size": 64}

  def write(grid, name="tiny.py", **block):
    block = {"config": "configs/digits_hamu.py", "set": small | block.pop("set", {}), "grid": grid, **block}
    path = tmp_path / name
    path.write_text(f"def get_sweep():\n  return {block!r}\n")
    return str(path)

  return write


@pytest.fixture
def members_of(sweep_file, tmp_path):
  """-> function: the members of a sweep of the given axes."""
  return lambda grid, **block: expand.expand(
    sweep_file(grid, **block), stage_cache=str(tmp_path / "run" / "stages")
  )


# One member after the other, makes every stage that is not in the cache in a tenth of a second, and logs
# what it does. Files in its workdir tell it to "sleep" or, once, to "kill" itself or "fail".
_STAND_IN = """
import json, os, pathlib, signal, sys, time
for argument in sys.argv[1:]:
  job = json.loads(argument)
  workdir, cache, log = (pathlib.Path(job[name]) for name in ("workdir", "cache", "log"))
  def say(*words):
    with open(log, "a") as file:
      file.write(json.dumps([time.monotonic(), *words]) + "\\n")
  workdir.mkdir(exist_ok=True)
  (workdir / "config.json").write_text(json.dumps(job["config"]))
  say("start", workdir.name, os.environ.get("CUDA_VISIBLE_DEVICES"))
  if (workdir / "sleep").exists():
    def end(*_):
      say("terminated", workdir.name)
      sys.exit(143)
    signal.signal(signal.SIGTERM, end)
    say("asleep", workdir.name)
    time.sleep(60)
  for stage, key in job["stages"].items():
    if not (cache / f"{stage}-{key}").exists():
      say("compute", f"{stage}-{key}")
      time.sleep(0.1)
      for what in ("kill", "fail"):
        if (workdir / what).exists():
          (workdir / what).unlink()
          print(f"error: told to {what}", flush=True)
          os.kill(os.getpid(), signal.SIGKILL) if what == "kill" else sys.exit(2)
      (cache / f"{stage}-{key}").mkdir(parents=True)
  time.sleep(0.05)
  (workdir / "summary.json").write_text(json.dumps({
      "results": {"unlearned": {"retain": {"accuracy": 0.5}}},
      "stop_reason": "finished after 1 applied steps",
      "provenance": {"stages": job["stages"]},
  }))
  say("end", workdir.name)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  """Replaces the members' processes; -> function: what they logged, as rows after the time."""
  log = tmp_path / "log"
  script = tmp_path / "stand_in.py"
  script.write_text(_STAND_IN)

  def command(members, workdir):
    jobs = [
      {
        "workdir": str(workdir / member.name),
        "cache": member.config.stage_cache,
        "config": rundir.jsonable(member.config.to_dict()),
        "stages": expand.shared_stages(member.config),
        "log": str(log),
      }
      for member in members
    ]
    return [sys.executable, "-S", str(script), *map(json.dumps, jobs)]

  monkeypatch.setattr(local, "command", command)
  return lambda: [json.loads(line)[1:] for line in log.open()] if log.exists() else []
