"""A wheel is enough: what it holds, and experiments and sweeps by it, away from the repository."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from hamu_jax.config import files

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ("hamu_jax", "sam_jax", "configs", "launch", "pyproject.toml", "setup.py", "README.md", "LICENSE")
# The digits on a multilayer perceptron, in seconds.
SMALL = [
  "--config.model.name=mlp",
  "--config.train.epochs=2",
  "--config.train.evaluate_epochs=1",
  "--config.method.epochs=2",
  "--config.method.batch_size=64",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """A wheel that is built of the sdist, of a copy, so that nothing is left in the repository."""
  copy = tmp_path_factory.mktemp("copy")
  for name in SOURCES:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(ROOT / name, copy / name)
  done = subprocess.run(
    [sys.executable, "-m", "build", "--no-isolation", f"--outdir={copy / 'dist'}", copy],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  (path,) = (copy / "dist").glob("*.whl")
  return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  """The folder of an installed wheel; what it depends on is that of these tests."""
  folder = tmp_path_factory.mktemp("installed")
  subprocess.run(
    [
      sys.executable,
      "-m",
      "pip",
      "install",
      "--quiet",
      "--no-deps",
      "--no-index",
      f"--target={folder}",
      wheel,
    ],
    check=True,
  )
  return folder


@pytest.fixture
def python(installed, tmp_path):
  """-> function: what a Python says that has the wheel alone, in a folder with nothing of the repository."""

  def run(*arguments):
    done = subprocess.run(
      [sys.executable, *arguments],
      cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(installed)},
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  return run


def test_it_holds_what_the_repository_has(wheel):
  names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
  wanted = {"hamu_jax/py.typed", "sam_jax/py.typed"}
  for package in ("hamu_jax", "sam_jax"):
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
  wanted |= {f"hamu_jax/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.py")}
  for pattern in ("*.sh", "*.sbatch"):
    wanted |= {f"hamu_jax/launchers/{path.name}" for path in (ROOT / "launch").glob(pattern)}
  invented = ROOT / "hamu_jax" / "models" / "invented"
  wanted |= {path.relative_to(ROOT).as_posix() for path in invented.iterdir()}
  assert names == wanted
  assert any(name.endswith("/licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_an_experiment_runs_by_its_name(python, installed, tmp_path):
  where = json.loads(
    python("-c", "import hamu_jax, json, sys; print(json.dumps([hamu_jax.__file__, sys.path]))")
  )
  assert where[0].startswith(str(installed))
  assert str(ROOT) not in where[1]
  python("-m", "hamu_jax.main", f"--config={files.PREFIX}digits_hamu", *SMALL)
  summary = json.loads((tmp_path / "runs" / "digits_hamu" / "summary.json").read_text())
  assert summary["results"].keys() == {"original", "retrained", "unlearned"}


def test_a_sweep_prints_commands_that_are_understood(python, tmp_path):
  sweep = ["-m", "hamu_jax.launch.sweep", f"--config={files.PREFIX}sweeps/cifar_constraint:digits"]
  commands = python(*sweep, "--engine=print").splitlines()
  # Two methods at ten ratios, with three seeds each.
  assert len(commands) == 60
  for command in commands:
    assert "-m hamu_jax.main --config=hamu_jax:digits_hamu " in command
    assert "--workdir=runs/cifar_constraint/" in command
  # A configuration of the package with words, which follow its own colon.
  sweep = [
    "-m",
    "hamu_jax.launch.sweep",
    f"--config={files.PREFIX}sweeps/sharp_digits",
    "--filter=^ga,high,sam,",
  ]
  assert "--config=hamu_jax:digits_sharp:ga,high,sam" in python(*sweep, "--engine=print")
  assert not (tmp_path / "runs").exists()
