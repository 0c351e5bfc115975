"""Experiments trained together: the numbers that each has alone, and who can be one of them."""

import json
import os
import re
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from hamu_jax import main
from hamu_jax.config import default as config_lib
from hamu_jax.config import readers
from hamu_jax.experiment import together
from hamu_jax.run import progress, rundir

# Steps enough for the members to part, and a pretraining that differs where the seed does.
MEMBERS = {
  "small": ["--config.method.constraint_ratio=0.02"],
  "large": ["--config.method.constraint_ratio=0.2", "--config.method.optimizer.learning_rate=0.05"],
  "shuffled": ["--config.method.seed=7"],
  "seeded": ["--config.seed=5"],
}


def of(config, **overrides):
  """The configuration with other fields, of which names have two underscores for the dot."""
  config = config.copy_and_resolve_references()
  for name, value in overrides.items():
    *sections, field = name.split("__")
    section = config
    for part in sections:
      section = section[part]
    section[field] = value
  return config


def joined(small, tmp_path, folder, names, *overrides):
  """The command of members with run directories in a folder and a stage cache of their own."""
  command = ["hamu_jax.together"]
  cache = f"--config.stage_cache={tmp_path / folder / 'stages'}"
  for name in names:
    command += [*small(f"{folder}/{name}", cache, *MEMBERS[name], *overrides)[1:], "--"]
  return command[:-1]


def results(workdir):
  summary = json.loads((workdir / "summary.json").read_text())
  return summary["results"], load_file(workdir / "unlearned.safetensors"), summary


def assert_close(found, wanted):
  if isinstance(wanted, dict):
    assert found.keys() == wanted.keys()
    for name in wanted:
      assert_close(found[name], wanted[name])
  elif isinstance(wanted, str):
    assert found == wanted
  else:
    np.testing.assert_allclose(
      np.asarray(found, np.float64), np.asarray(wanted, np.float64), rtol=2e-3, atol=2e-4
    )


@pytest.mark.slow
def test_each_ends_as_it_does_alone(small, tmp_path):
  assert together.run(joined(small, tmp_path, "together", MEMBERS)) == 0
  for name, overrides in MEMBERS.items():
    cache = f"--config.stage_cache={tmp_path / 'alone' / 'stages'}"
    assert main.run(small(f"alone/{name}", cache, *overrides)) == 0
    (found, weights, summary), (wanted, others, _) = (
      results(tmp_path / folder / name) for folder in ("together", "alone")
    )
    assert_close(found, wanted)
    assert_close(weights, others)
    logs = [rundir.read_metrics(tmp_path / folder / name).rows for folder in ("together", "alone")]
    unlearning = [[index for index in indices if index["stage"] == "unlearn"] for indices in logs]
    assert len(unlearning[0]) == len(unlearning[1]) > 0
    for index, other in zip(*unlearning, strict=True):
      assert index.keys() == other.keys()
      assert_close(index["retain_loss"] if "retain_loss" in index else index, other.get("retain_loss", other))
    assert summary["provenance"]["together"] == {"pretrain": 2, "retrain": 2, "unlearn": 4}
  # The members are different experiments.
  assert len({str(results(tmp_path / "together" / name)[0]["unlearned"]) for name in MEMBERS}) == 4
  # Nothing is left to do, together or alone.
  indices = (tmp_path / "together" / "small" / "metrics.jsonl").read_bytes()
  assert together.run(joined(small, tmp_path, "together", MEMBERS)) == 0
  assert (tmp_path / "together" / "small" / "metrics.jsonl").read_bytes() == indices


@pytest.mark.slow
def test_interrupted_members_go_on(small, tmp_path, monkeypatch):
  names, eager = ("small", "large"), "--config.checkpoint_seconds=0"
  assert together.run(joined(small, tmp_path, "whole", names, eager)) == 0

  class Ended(BaseException):
    pass

  def end(status):
    raise Ended(status)

  update = progress.Progress.update

  def signalling(bar, step, values):
    if "forget_loss" in values and step > 5:
      os.kill(os.getpid(), signal.SIGTERM)
    update(bar, step, values)

  monkeypatch.setattr(os, "_exit", end)
  with monkeypatch.context() as patch:
    patch.setattr(progress.Progress, "update", signalling)
    with pytest.raises(Ended, match="143"):
      together.run(joined(small, tmp_path, "run", names, eager))
  assert not (tmp_path / "run" / "small" / "summary.json").exists()
  assert together.run(joined(small, tmp_path, "run", names, eager)) == 0
  for name in names:
    found, wanted = (results(tmp_path / folder / name) for folder in ("run", "whole"))
    assert found[0] == wanted[0]
    for tensor, value in wanted[1].items():
      np.testing.assert_array_equal(found[1][tensor], value)


def test_one_that_diverges_leaves_the_others(small, tmp_path, capsys):
  MEMBERS["diverging"] = ["--config.train.optimizer.learning_rate=1000"]
  try:
    names = ("diverging", "small")
    short = ["--config.train.epochs=1", "--config.method.epochs=1", "--config.train.clip_norm=0"]
    # Each step then multiplies the weights of the first by -1e6.
    decay = "--config.train.optimizer.weight_decay=1000"
    assert together.run(joined(small, tmp_path, "run", names, *short, decay)) == 2
  finally:
    del MEMBERS["diverging"]
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith(f"error: {tmp_path / 'run' / 'diverging'}: pretrain: a loss, gradient or update")
  assert (tmp_path / "run" / "small" / "summary.json").exists()
  assert not (tmp_path / "run" / "diverging" / "summary.json").exists()


ALIKE = {
  "constraint": {"method__constraint_ratio": 0.9},
  "rate": {"method__optimizer__learning_rate": 1.0},
  "training": {"train__optimizer__learning_rate": 1.0},
  "clipping": {"method__clip_norm": 9.0},
  "seeds": {"seed": 1, "method__seed": 2, "evaluate__seed": 3},
  "incidental": {"checkpoint_seconds": 9.0},
}
APART = {
  "method": {"method__name": "gdiff"},
  "batch": {"method__batch_size": 7},
  "steps": {"method__epochs": 3.0},
  "no clipping": {"method__clip_norm": 0.0},
  "absolute": {"method__constraint": 0.1},
  "sharpness": {"sam__rho": 0.1},
  "split": {"data__seed": 1},
  "optimizer": {"method__optimizer__momentum": 0.9},
  "devices": {"pairing": "pmap"},
  "processes": {"distributed__coordinator": "auto"},
  "wandb": {"wandb__project": "unlearning"},
}


@pytest.mark.parametrize("overrides", ALIKE.values(), ids=ALIKE)
def test_settings_and_seeds_do_not_part(overrides):
  config = config_lib.default_config()
  assert together.group_key(of(config, **overrides)) == together.group_key(config) is not None


@pytest.mark.parametrize("overrides", APART.values(), ids=APART)
def test_whatever_else_does(overrides):
  config = config_lib.default_config()
  assert together.group_key(of(config, **overrides)) != together.group_key(config)


def test_seeds_part_where_data_depend_on_them():
  estimated = of(config_lib.default_config(), data__scores=readers.ESTIMATE)
  text = of(config_lib.default_config(), model__name="llama")
  for config in (estimated, text):
    for seed in ("seed", "method__seed"):
      assert together.group_key(of(config, **{seed: 1})) != together.group_key(config)


BAD_INPUT = {
  "another option": (["small", "large"], ["--config.method.share=equal"], "differs from that of .*/small"),
  "a workdir twice": (["small", "small"], [], "two experiments have it"),
  "several devices": (["small", "large"], ["--config.pairing=pmap"], "run it by hamu_jax.main"),
}


@pytest.mark.parametrize(("names", "last", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line_and_status_2(small, tmp_path, capsys, names, last, message):
  assert together.run([*joined(small, tmp_path, "run", names), *last]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and len(error.splitlines()) == 1
  assert re.search(message, error), error
  assert not (tmp_path / "run").exists()
