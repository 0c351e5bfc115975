"""plain, average, add: golden baselines and what the state carries."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hamu_jax.errors import UserError
from hamu_jax.transforms import add, average, plain


def test_golden_baselines(golden, x64):
  """gdiff, kl and scrub are averages of gradients that carry their objective's coefficients."""
  cases = json.loads((golden / "hamu/baseline_cases.json").read_text())["cases"]
  arrays = np.load(golden / "hamu/baseline_cases.npz")
  cases = [case for case in cases if case["function"] in ("gdiff", "kl", "scrub")]
  assert len(cases) == 12
  for case in cases:
    given = {name: jnp.asarray(arrays[f"{case['id']}.{name}"]) for name in case["inputs"]}
    if case["function"] == "scrub":
      retain = case["alpha"] * given["retain_kl"] + case["gamma"] * given["retain"]
      forget = -given["forget_kl"]
    else:
      retain = given["retain" if case["function"] == "gdiff" else "retain_kl"]
      forget = -given["forget"]
    tx = average()
    updates, _ = tx.update([retain], tx.init([retain]), forget_grads=[forget])
    np.testing.assert_allclose(updates[0], arrays[case["id"] + ".grad"], rtol=1e-12)


@pytest.mark.parametrize("factory, factor", [(average, 0.5), (add, 1.0)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_linear_combinations(factory, factor, dtype):
  """Through a chain with sgd, dtypes kept, angles of the gradients as handed in."""
  retain = {"a": jnp.array([3.0, 0.0], dtype), "b": jnp.array([[1.0]], dtype)}
  forget = {"a": jnp.array([0.0, -4.0], dtype), "b": jnp.array([[-2.0]], dtype)}
  tx = optax.chain(factory(), optax.sgd(1.0))
  updates, state = tx.update(retain, tx.init(retain), retain, forget_grads=forget)
  np.testing.assert_array_equal(updates["a"], -factor * np.array([3.0, -4.0]))
  np.testing.assert_array_equal(updates["b"], -factor * np.array([[-1.0]]))
  assert all(x.dtype == dtype for x in jax.tree.leaves(updates))
  kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, tx.init(retain))]
  assert kinds[0] == kinds[1]
  seen = state[0].diagnostics
  np.testing.assert_allclose(seen.angle, [90, 180])
  np.testing.assert_allclose(seen.retain_norm, [3, 1])
  np.testing.assert_allclose(seen.forget_norm, [4, 2])
  np.testing.assert_allclose(seen.dot, [0, -2])


def test_plain_passes_its_one_role_through():
  gradient = {"w": jnp.arange(3.0)}
  tx = plain()
  state = tx.init(gradient)
  assert tx.update(gradient, state)[0] is gradient
  assert tx.update(None, state, forget_grads=gradient)[0] is gradient
  for retain, forget in ((gradient, gradient), (None, None)):
    with pytest.raises(UserError, match="one role"):
      tx.update(retain, state, forget_grads=forget)
