"""Imports run downwards only, and the root of the package stays small."""

import pathlib

from importlinter import api, cli

ROOT = pathlib.Path(__file__).parent.parent


def test_imports_run_downwards(monkeypatch):
  monkeypatch.chdir(ROOT)
  assert cli.lint_imports(no_cache=True) == cli.EXIT_STATUS_SUCCESS


def test_an_upward_import_would_be_found(monkeypatch):
  monkeypatch.chdir(ROOT)
  floors = api.read_configuration()["contracts_options"][0]["layers"]
  assert floors.index("engine") < floors.index("data")


def test_every_folder_says_what_lives_there():
  for path in (ROOT / "hamu_jax").glob("*/__init__.py"):
    assert path.read_text().startswith('"""'), path
