"""What the tests of the documentation have in common."""

import pathlib

import pytest

from hamu_jax import data, models
from hamu_jax.config import modalities
from hamu_jax.engine import methods, objectives
from hamu_jax.experiment import tasks

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
  """Paths count from the repository's root; rows that an example adds are gone after its test."""
  monkeypatch.chdir(ROOT)
  tables = (
    methods.METHODS,
    objectives.TERMS,
    models.MODELS,
    data.SOURCES,
    tasks.TASKS,
    modalities.MODALITIES,
  )
  before = [dict(table) for table in tables]
  yield
  for table, rows in zip(tables, before):
    table.clear()
    table.update(rows)


@pytest.fixture
def examples():
  """The folder of the examples that pages include."""
  return ROOT / "docs" / "examples"
