"""The table of methods against the definitions, row by row."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.config import default as config_lib
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.engine import methods, objectives

OPTIONS = config_lib.default_config().method


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
    ("retrain", {"ce": 1.0}, None),
    ("random_label", {"random_label": 1.0}, None),
    ("salun", {"random_label": 1.0}, None),
    ("neggrad", {"ce": 0.99}, {"ce": -0.01}),
  ],
)
def test_objectives_of_a_method(name, retain, forget):
  (substep,) = methods.METHODS[name].substeps
  wanted = [role and {key: jnp.float32(value) for key, value in role.items()} for role in (retain, forget)]
  got = substep.coefficients(hyperparameters_of(OPTIONS, methods.METHODS[name]), 0)
  for role, expected in zip(got, wanted, strict=True):
    chex.assert_trees_all_close(role, expected, rtol=1e-5)
  assert list(substep.terms) == [role and tuple(sorted(role)) for role in (retain, forget)]


def test_objectives_of_the_methods_with_two_sub_steps():
  minmax, distill = methods.METHODS["sharp_minmax"], methods.METHODS["scrub_distill"]
  hyperparameters = hyperparameters_of(OPTIONS, minmax)
  retain, forget = minmax.substeps
  assert float(retain.coefficients(hyperparameters, 0).retain["ce"]) == pytest.approx(0.99)
  assert float(forget.coefficients(hyperparameters, 0).forget["ce"]) == pytest.approx(-0.01)
  assert (retain.forget, forget.retain) == (None, None)
  assert (retain.moves, forget.moves) == ("rest", "salient")
  ascent, descent = methods.METHODS["scrub_distill"].substeps
  assert (ascent.forget, ascent.epochs) == ({"distillation": -1.0}, "msteps")
  got = descent.coefficients(hyperparameters_of(OPTIONS, distill), 0).retain
  assert {name: round(float(value), 6) for name, value in got.items()} == {"ce": 0.99, "distillation": 0.1}
  # One SGD state for both passes, one each for the halves of sharp_minmax.
  assert methods.METHODS["scrub_distill"].optimizers == ("shared",)
  assert methods.METHODS["sharp_minmax"].optimizers == ("retain", "forget")


def test_the_l1_weight_falls_linearly_to_the_epochs_without_it():
  (substep,) = methods.METHODS["ft_l1"].substeps
  hyperparameters = {"epochs": 5, "l1_free_epochs": 1, "l1_weight": 0.4}
  weights = [float(substep.coefficients(hyperparameters, epoch).retain["l1"]) for epoch in range(5)]
  np.testing.assert_allclose(weights, [0.4, 0.3, 0.2, 0.1, 0.0], atol=1e-7)


def test_the_table_holds_the_methods_of_both_papers_and_those_of_language_models():
  of_language = {"npo", "simnpo", "dpo", "idk", "undial", "wga"}
  of_language |= {f"{name}_kl" for name in of_language} | {"rmu"}
  assert set(methods.METHODS) == {
    "none",
    "ft",
    "ga",
    "gdiff",
    "kl",
    "scrub",
    "gru",
    "pcgrad",
    "hamu-q",
    "hamu-u",
    "retrain",
    "ft_l1",
    "random_label",
    "salun",
    "neggrad",
    "scrub_distill",
    "sharp_minmax",
    *of_language,
  }
  assert {name for name, index in methods.METHODS.items() if index.for_language} == of_language


def test_terms_of_a_role_are_averaged_over_the_same():
  for name, method in methods.METHODS.items():
    for substep in method.substeps:
      for terms in filter(None, substep.terms):
        assert len({objectives.TERMS[term].over for term in terms}) == 1, name


@pytest.mark.parametrize(
  ("name", "roles", "reference"),
  [
    ("ft", ("retain",), False),
    ("ga", ("forget",), False),
    ("scrub", ("retain", "forget"), True),
    ("kl", ("retain", "forget"), True),
    ("hamu-q", ("retain", "forget"), False),
    ("random_label", ("retain",), False),
    ("scrub_distill", ("retain", "forget"), True),
    ("sharp_minmax", ("retain", "forget"), False),
  ],
)
def test_what_a_method_reads(name, roles, reference):
  method = methods.METHODS[name]
  assert method.roles == roles
  assert methods.needs_reference(method, objectives.TERMS) is reference
