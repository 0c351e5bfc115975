"""Notebooks are committed without outputs, and run from their folder and from the root."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# As a kernel does: the cells in order in one namespace, and the value of each last expression shown.
_RUN = """
import ast, json, pathlib, sys
namespace = {"__name__": "__main__"}
for source in json.loads(pathlib.Path(sys.argv[1]).read_text()):
  body = ast.parse(source).body
  last = body.pop() if isinstance(body[-1], ast.Expr) else None
  exec(compile(ast.Module(body, []), "cell", "exec"), namespace)
  shown = eval(compile(ast.Expression(last.value), "cell", "eval"), namespace) if last else None
  if shown is not None:
    print("SHOWN", type(shown).__name__, len(shown._repr_png_()))
"""


def _sources(path):
  return ["".join(cell["source"]) for cell in _cells(path) if cell["cell_type"] == "code"]


def _cells(path):
  return json.loads(path.read_text())["cells"]


def _execute(tmp_path, sources, cwd):
  """-> the lines that are printed."""
  (tmp_path / "cells.json").write_text(json.dumps(sources))
  finished = subprocess.run(
    [sys.executable, "-c", _RUN, str(tmp_path / "cells.json")],
    cwd=cwd,
    text=True,
    capture_output=True,
    env=os.environ
    | {
      "PYTHONPATH": str(ROOT),
      "MPLBACKEND": "Agg",
      "TMPDIR": str(tmp_path),
      "XLA_FLAGS": "",
    },
  )
  assert finished.returncode == 0, finished.stderr
  return finished.stdout.splitlines()


def test_there_are_some():
  assert "gradient_alignment.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_a_notebook_without_outputs(path):
  notebook = json.loads(path.read_text())
  assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
  ids = [cell["id"] for cell in notebook["cells"]]
  assert len(set(ids)) == len(ids)
  for cell in notebook["cells"]:
    assert "".join(cell["source"]).strip()
    if cell["cell_type"] == "code":
      assert cell["outputs"] == [] and cell["execution_count"] is None
  # Every piece of code is introduced.
  kinds = [cell["cell_type"] for cell in notebook["cells"]]
  assert kinds[0] == "markdown"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_finds_the_project_from_its_root(path, tmp_path):
  _execute(tmp_path, [*_sources(path)[:1], "print(make_config().model.name)"], ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_in_its_folder(path, tmp_path):
  lines = _execute(tmp_path, _sources(path), path.parent)
  shown = [line.split() for line in lines if line.startswith("SHOWN")]
  assert len(shown) >= 3 and all(int(size) > 10_000 for *_, size in shown)
