"""The table of methods against the definitions, row by row."""

import jax.numpy as jnp
import pytest

from hamu_jax import config as config_lib
from hamu_jax import methods, objectives
from hamu_jax import step as step_lib

SETTINGS = step_lib.settings_of(config_lib.default_config().method)


@pytest.mark.parametrize(
    ("name", "retain", "forget"),
    [
        ("ft", {"ce": 1.0}, None),
        ("ga", None, {"ce": -1.0}),
        ("gdiff", {"ce": 1.0}, {"ce": -1.0}),
        ("kl", {"kl": 1.0}, {"ce": -1.0}),
        ("scrub", {"ce": 0.99, "kl": 0.001}, {"kl": -1.0}),
        ("gru", {"ce": 1.0}, {"ce": 1.0}),
        ("pcgrad", {"ce": 1.0}, {"ce": 1.0}),
        ("hamu-q", {"ce": 1.0}, {"ce": 1.0}),
        ("hamu-u", {"ce": 1.0}, {"ce": 1.0}),
    ],
)
def test_objectives_of_a_method(name, retain, forget):
  (substep,) = methods.METHODS[name].substeps
  wanted = [role and {key: jnp.float32(value) for key, value in role.items()} for role in (retain, forget)]
  assert list(substep.coefficients(SETTINGS)) == wanted
  assert list(substep.terms) == [role and tuple(sorted(role)) for role in (retain, forget)]


def test_the_table_holds_the_nine_methods():
  assert sorted(methods.METHODS) == sorted(
      ["ft", "ga", "gdiff", "kl", "scrub", "gru", "pcgrad", "hamu-q", "hamu-u"]
  )


@pytest.mark.parametrize(
    ("name", "roles", "reference"),
    [
        ("ft", ("retain",), False),
        ("ga", ("forget",), False),
        ("scrub", ("retain", "forget"), True),
        ("kl", ("retain", "forget"), True),
        ("hamu-q", ("retain", "forget"), False),
    ],
)
def test_what_a_method_reads(name, roles, reference):
  method = methods.METHODS[name]
  assert method.roles == roles
  assert methods.needs_reference(method, objectives.TERMS) is reference
