"""What the tests of several transforms share: the optimality conditions of the HAMU problem."""

import numpy as np
import pytest
from scipy.optimize import nnls


def _assert_optimal(delta, retain, forget, *, radius, constraint, rtol=1e-8, rng=None):
  """Asserts that `delta` minimises g_r.d subject to g_f.d >= c and |d| <= R.

  The problem is convex and, with some slack, delta is optimal exactly when it is feasible and
  multipliers lambda, nu >= 0 with g_r = lambda g_f - nu d exist, each zero where its constraint is
  slack. Independently of that, no random feasible step may be better.
  """
  d, g_r, g_f = (np.asarray(x, np.float64).ravel() for x in (delta, retain, forget))
  forget_norm = np.linalg.norm(g_f)
  assert np.linalg.norm(d) <= radius * (1 + rtol)
  assert g_f @ d >= constraint - rtol * forget_norm * radius

  columns = []
  if g_f @ d <= constraint + rtol * forget_norm * radius:
    columns.append(g_f / forget_norm)
  if np.linalg.norm(d) >= radius * (1 - rtol):
    columns.append(-d / radius)
  scale = np.linalg.norm(g_r)
  residual = nnls(np.stack(columns, 1), g_r)[1] if columns else scale
  assert residual <= np.sqrt(rtol) * scale, "no multipliers"

  rng = rng or np.random.default_rng(0)
  along = rng.uniform(constraint / forget_norm, radius, size=[300, 1])
  sideways = rng.normal(size=[300, d.size])
  sideways -= np.outer(sideways @ g_f, g_f) / forget_norm**2
  lengths = np.sqrt(radius**2 - along**2) * rng.uniform(size=[300, 1]) ** 0.25
  sideways *= lengths / np.maximum(np.linalg.norm(sideways, axis=1, keepdims=True), 1e-300)
  others = along * g_f / forget_norm + (sideways if d.size > 1 else 0)
  assert (others @ g_r).min() >= g_r @ d - rtol * scale * radius


@pytest.fixture
def assert_optimal():
  return _assert_optimal
