"""Imports run downwards only, and rooms stay small enough to read."""

import ast
import pathlib
import shutil
import subprocess
import sys

from importlinter import cli

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("hamu_jax", "sam_jax")


def modules():
  for package in PACKAGES:
    yield from sorted((ROOT / package).rglob("*.py"))


def test_imports_run_downwards(monkeypatch):
  monkeypatch.chdir(ROOT)
  assert cli.lint_imports(no_cache=True) == cli.EXIT_STATUS_SUCCESS


def test_an_upward_import_is_found(tmp_path):
  for package in PACKAGES:
    shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
  shutil.copy(ROOT / "pyproject.toml", tmp_path)
  with (tmp_path / "hamu_jax" / "data" / "window.py").open("a") as module:
    module.write("from hamu_jax.engine import step\n")
  command = [
    sys.executable,
    "-c",
    "from importlinter.cli import lint_imports_command as run; run()",
    "--no-cache",
  ]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 1 and "hamu_jax.data.window" in done.stdout


def test_every_folder_says_what_lives_there():
  for package in PACKAGES:
    for path in (ROOT / package).rglob("__init__.py"):
      assert path.read_text().startswith('"""'), path


def test_the_root_is_small():
  assert len(list((ROOT / "hamu_jax").glob("*.py"))) <= 12


def test_nothing_is_too_long_to_read():
  for path in modules():
    text = path.read_text()
    assert len(text.splitlines()) <= 400, path
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.ClassDef):
        assert node.end_lineno - node.lineno < 250, f"{path}: {node.name}"
      elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False) or ""
        lines = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
        assert lines <= 60, f"{path}: {node.name}"
