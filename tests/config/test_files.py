"""Configurations by name: what they lead to, in a clone or beside an installed package; what is refused."""

import pathlib

import pytest

from hamu_jax import main
from hamu_jax.analysis import hardness
from hamu_jax.config import command_line, files
from hamu_jax.errors import UserError
from hamu_jax.experiment import together
from hamu_jax.launch import sweep
from hamu_jax.planning import plan

ROOT = pathlib.Path(__file__).parent.parent.parent
ALL = sorted((ROOT / "configs").rglob("*.py"))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_configuration_is_found_by_its_name(path):
  name = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
  assert files.find(f"hamu_jax:{name}") == str(path)
  assert files.find(f"hamu_jax:{name}:a,b:c") == f"{path}:a,b:c"


@pytest.mark.parametrize(
  "value",
  ["configs/digits_hamu.py", "configs/cifar_hamu.py:smoke", "hamu_jax", "hamu_jax/x.py:hamu_jax:y", ""],
)
def test_anything_else_is_left_alone(value):
  assert files.find(value) == value


@pytest.mark.parametrize(
  ("value", "nearest"),
  [
    ("hamu_jax:digit_hamu", "hamu_jax:digits_hamu"),
    ("hamu_jax:cifar_constraint:digits", "hamu_jax:sweeps/cifar_constraint"),
    ("hamu_jax:configs/digits_hamu.py", "hamu_jax:digits_hamu"),
    ("hamu_jax:../setup", "hamu_jax:"),
    ("hamu_jax:", "hamu_jax:"),
  ],
)
def test_an_unknown_name_is_one_line_with_the_nearest(value, nearest):
  with pytest.raises(UserError, match=f"^--config={value}: .*the nearest are .*{nearest}") as error:
    files.find(value)
  assert len(str(error.value).splitlines()) == 1


def test_those_beside_an_installed_package_come_first(tmp_path, monkeypatch):
  package = tmp_path / "hamu_jax" / "configs"
  clone = tmp_path / "configs"
  monkeypatch.setattr(files, "_FOLDERS", (package, clone))
  with pytest.raises(UserError, match="^--config=hamu_jax:mine: .*neither in .*install"):
    files.find("hamu_jax:mine")
  for folder in (clone, package):
    folder.mkdir(parents=True)
    (folder / "mine.py").touch()
    assert files.find("hamu_jax:mine") == str(folder / "mine.py")


@pytest.mark.parametrize(
  "config", [["--config=hamu_jax:cifar_hamu:smoke"], ["--config", "hamu_jax:cifar_hamu:smoke"]]
)
def test_a_command_line_takes_them_from_any_folder(config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  values = command_line.parse(["hamu_jax.main", *config, "--config.seed=7"])
  assert (values.config.data.train_size, values.config.seed) == (10_000, 7)
  assert command_line.workdir_of(values) == pathlib.Path("runs/cifar_hamu")


@pytest.mark.parametrize(
  ("program", "options"),
  [(main, []), (hardness, []), (together, []), (plan, ["--topology=v5e:2x4"]), (sweep, [])],
)
def test_every_program_refuses_an_unknown_name(program, options, capsys):
  assert program.run(["program", "--config=hamu_jax:digit_hamu", *options]) == 2
  assert "error: --config=hamu_jax:digit_hamu: hamu_jax ships no" in capsys.readouterr().err
