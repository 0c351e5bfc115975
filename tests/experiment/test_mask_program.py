"""The mask stage by itself."""

import re

import numpy as np
from safetensors.numpy import load_file

from hamu_jax import main, mask
from hamu_jax.engine import loop as loop_lib
from tests.experiment.test_header import SMALL

_HALF = ["--config.mask.fraction=0.5", "--config.mask.fractions=(0.5,0.1)"]


def test_the_mask_is_computed_alone_and_other_runs_read_it(tmp_path, capfd, monkeypatch):
  assert mask.run([*SMALL, f"--workdir={tmp_path}", *_HALF]) == 0
  said = capfd.readouterr().out
  # Of 4,810 weights.
  assert re.search(r"fraction 0.5: 2,405 weights, .*\nfraction 0.1: 481 weights, ", said)
  file = tmp_path / "mask.safetensors"
  assert sum(int(np.sum(tensor)) for tensor in load_file(file).values()) == 2405
  assert not (tmp_path / "summary.json").exists()
  # The same run goes on from there, and another one reads the file.
  monkeypatch.setattr(loop_lib.Loop, "run", None)
  assert main.run([*SMALL, f"--workdir={tmp_path}", *_HALF, "--dry-run"]) == 0
  assert "to compute: unlearn (1 step); from the cache: pretrain, mask\n" in capfd.readouterr().out
  given = [f"--workdir={tmp_path / 'other'}", f"--config.mask.path={file}"]
  assert main.run([*SMALL, *given, "--dry-run"]) == 0
  capfd.readouterr()
  for arguments, message in (
    (given, "config.mask.path=.*: the mask is there already; leave the path out"),
    ([], "config.mask.fraction=0.0: .* has no mask here; choose a fraction"),
  ):
    assert mask.run([*SMALL, *arguments]) == 2
    assert re.fullmatch(f"error: {message}.*\n", capfd.readouterr().err)
