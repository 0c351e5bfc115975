"""What is wrong with a command line is one line, whatever Python and absl would say."""

import re

import pytest

from hamu_jax.config import command_line
from hamu_jax.errors import UserError

DIGITS = "--config=configs/digits_hamu.py"


@pytest.mark.parametrize("text, epochs", [("0.5", 0.5), ("2", 2), ("1e-1", 0.1), (".25", 0.25)])
def test_a_number_with_a_whole_default_may_be_a_fraction(text, epochs, monkeypatch, request):
  monkeypatch.chdir(request.config.rootpath)
  arguments = ["main", "--config=configs/digits_hamu.py", f"--config.train.epochs={text}"]
  found = command_line.parse(arguments)
  assert found.config.train.epochs == epochs and "train.epochs" in found.given


def test_fields_that_are_given_are_known(monkeypatch, request):
  monkeypatch.chdir(request.config.rootpath)
  values = command_line.parse(
    ["main", "--config", "configs/digits_hamu.py", "--config.seed=3", "--noconfig.retrain", "--workdir=there"]
  )
  assert values.given == {"seed", "retrain"}
  assert (values.config.seed, values.config.retrain) == (3, False)
  assert str(command_line.workdir_of(values)) == "there"
  assert str(command_line.workdir_of(command_line.parse(["main", DIGITS]))) == "runs/digits_hamu"


REFUSED = {
  "no such file": (
    ["--config=configs/digits_hamo.py"],
    "no such file; .* configs/digits_hamu.py",
  ),
  "no such folder": (
    ["--config=config/x.py"],
    "x.py: no such file; the nearest are hamu_jax:",
  ),
  "a variant of a file without": (
    ["--config=configs/digits_hamu.py:smoke"],
    "configs/digits_hamu.py has no variants; leave out :smoke",
  ),
  "an unknown variant": (
    ["--config=configs/cifar_hamu.py:smok"],
    "cifar_hamu.py:smok is unknown; choose cifar_hamu.py or cifar_hamu.py:smoke",
  ),
  "no configuration": ([], "--config is missing; for example --config=hamu_jax:digits_hamu"),
  "another type": ([DIGITS, "--config.seed=x"], "config.seed='x': must be a whole number, at least 0"),
  "no number": (
    [DIGITS, "--config.train.epochs=abc"],
    "epochs='abc': must be a number, at least 1e-06",
  ),
  "an unknown field": ([DIGITS, "--config.sed=1"], "config.sed: no such field; the nearest is config.seed"),
  "what absl ignores": ([DIGITS, "--undefok=x"], "--undefok=x: not understood"),
  "a field given twice": ([DIGITS, "--config.seed=1", "--config.seed=2"], "--config.seed: is given twice"),
  "a flag given twice": (
    [DIGITS, "--config.retrain", "--noconfig.retrain"],
    "--config.retrain: is given twice",
  ),
  "two configurations": ([DIGITS, DIGITS], "--config: is given twice; leave one out"),
  "a workdir that is a file": (
    [DIGITS, "--workdir=FOLDER/exits.py"],
    "exits.py is not a folder; choose another",
  ),
  "an empty workdir": ([DIGITS, "--workdir="], "--workdir=: is empty; give a folder"),
  "a file that exits": (
    ["--config=FOLDER/exits.py"],
    "calls sys.exit\\(\\); return a configuration",
  ),
  "a file that fails": (["--config=FOLDER/fails.py"], "fails.py: the moon is full"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_command_lines_are_one_line(case, tmp_path, monkeypatch, request):
  monkeypatch.chdir(request.config.rootpath)
  (tmp_path / "exits.py").write_text("import sys\n\ndef get_config():\n  sys.exit(0)\n")
  (tmp_path / "fails.py").write_text("def get_config():\n  raise RuntimeError('the moon is full')\n")
  arguments, message = REFUSED[case]
  with pytest.raises(UserError) as error:
    command_line.parse(["main", *(each.replace("FOLDER", str(tmp_path)) for each in arguments)])
  assert re.search(message, str(error.value)), error.value
  assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
