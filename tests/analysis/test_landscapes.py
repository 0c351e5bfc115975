"""Loss landscapes, against NumPy."""

import jax
import numpy as np
import pytest

from hamu_jax.analysis import examples as examples_lib
from hamu_jax.analysis import landscapes
from hamu_jax.metrics import classification
from tests.analysis import perceptrons


def test_landscapes_in_one_program(make_run, monkeypatch):
  """The middle is the mean loss of each set, of unequal sizes; the program is traced once."""
  run = examples_lib.load_run(make_run(), max_examples=1000, seed=0)
  traces = []
  per_example = classification.per_example
  monkeypatch.setattr(
    classification, "per_example", lambda *args: (traces.append(None), per_example(*args))[1]
  )
  variables = {name: jax.tree.map(np.float32, perceptrons.variables(seed)) for seed, name in enumerate("ab")}
  coordinates, grids = landscapes.compute_landscapes(
    run, variables, points=3, max_examples=300, normalization="filter", seed=0
  )
  assert len(traces) == 1
  np.testing.assert_array_equal(coordinates, [-1, 0, 1])
  for name, sets in grids.items():
    for role, size, whole in (
      ("retain", 300, run.examples.retain),
      ("forget", 60, run.examples.forget),
      ("test", 300, run.test),
    ):
      examples = examples_lib.Examples(*(array[:size] for array in whole))
      _, losses = perceptrons.forward(perceptrons.variables("ab".index(name)), examples)
      grid = sets[role]
      assert grid[1, 1] == pytest.approx(losses.mean(), rel=1e-4)
      assert len(np.unique(grid)) == 9
