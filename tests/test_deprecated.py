"""Imports that the documentation showed before the modules moved still work, with a warning."""

import importlib
import sys

import pytest

import hamu_jax
from hamu_jax import analysis
from hamu_jax.config import digits
from hamu_jax.engine import methods, objectives
from hamu_jax.report import gather
from hamu_jax.run import preemption, rundir


@pytest.mark.parametrize("module", [methods, objectives, preemption, rundir])
def test_a_moved_module_is_found_under_its_old_name(module):
  name = module.__name__.rpartition(".")[2]
  with pytest.warns(DeprecationWarning, match=f"hamu_jax.{name} is now {module.__name__}"):
    assert getattr(hamu_jax, name) is module


def test_the_report_module_of_analysis():
  with pytest.warns(DeprecationWarning, match="is now hamu_jax.report.gather"):
    assert analysis.gather is gather


def test_the_digits_module():
  sys.modules.pop("hamu_jax.digits_config", None)
  with pytest.warns(DeprecationWarning, match="is now hamu_jax.config.digits"):
    assert importlib.import_module("hamu_jax.digits_config").on_digits is digits.on_digits


def test_other_names_are_unknown():
  for module in (hamu_jax, analysis):
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
      module.nothing
