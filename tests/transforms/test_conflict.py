"""GRU and PCGrad: golden cases, their geometry, limits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.errors import UserError
from hamu_jax.transforms import gru, pcgrad

TRANSFORMS = {"gru": gru, "pcgrad": pcgrad}


def _update(tx, retain, forget):
  updates, state = tx.update(retain, tx.init(retain), retain, forget_grads=forget)
  return updates, state


def _rest_of_model(case, retain, forget):
  """Gradients of a second tensor that complete the block's norms and dot to the whole model's."""
  retain_square = case["full_retain_norm"] ** 2 - np.sum(retain**2)
  dot = case["full_dot_product"] - np.sum(retain * forget)
  forget_square = 2 * dot**2 / retain_square  # gru is not told |g_f|: any length that fits
  if "full_forget_norm" in case:
    forget_square = case["full_forget_norm"] ** 2 - np.sum(forget**2)
  along = dot / np.sqrt(retain_square)
  return np.array([np.sqrt(retain_square), 0]), np.array([along, np.sqrt(forget_square - along**2)])


def test_golden_baselines(golden, x64):
  """Every gru and pcgrad case of the published implementation, whole-model ones as two tensors."""
  cases = json.loads((golden / "hamu/baseline_cases.json").read_text())["cases"]
  arrays = np.load(golden / "hamu/baseline_cases.npz")
  cases = [case for case in cases if case["function"] in TRANSFORMS]
  assert len(cases) == 43
  for case in cases:
    retain, forget, expected = (arrays[f"{case['id']}.{name}"] for name in ("retain", "forget", "grad"))
    trees, max_norm = ({"block": retain}, {"block": forget}), case["tau"]
    if "full_dot_product" in case:
      # There the reference scales each tensor on its own; ours scales the whole result.
      max_norm = None
      for tree, rest in zip(trees, _rest_of_model(case, retain, forget), strict=True):
        tree["rest"] = rest
    trees = jax.tree.map(jnp.asarray, trees)
    tx = TRANSFORMS[case["function"]](max_norm=max_norm, reference_sign=True)
    block = np.asarray(_update(tx, *trees)[0]["block"])
    if max_norm is None and case["tau"] is not None:
      block = block * min(1, case["tau"] / np.linalg.norm(block))
    np.testing.assert_allclose(block, expected, rtol=0, atol=1e-9 * np.abs(expected).max(), err_msg=str(case))


def _trees(seed, conflict):
  """Two-tensor gradients with g_r.g_f > 0 (or < 0) over the model, the other way round in one."""
  rng = np.random.default_rng(seed)
  retain = {"a": rng.normal(size=[3, 4]), "b": rng.normal(size=6)}
  forget = {"a": rng.normal(size=[3, 4]), "b": -retain["b"]}
  strength = 3 * np.sum(retain["b"] ** 2) - np.sum(retain["a"] * forget["a"])
  forget["a"] += strength / np.sum(retain["a"] ** 2) * retain["a"]
  sign = 1.0 if conflict else -1.0
  forget = {name: sign * x for name, x in forget.items()}
  return jax.tree.map(jnp.asarray, (retain, forget))


def _flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("seed", range(3))
def test_gru_ascends_along_the_retain_level_set(x64, seed):
  retain, forget = _trees(seed, conflict=True)
  updates, state = _update(gru(), retain, forget)
  r, f, u = map(_flat, (retain, forget, updates))
  assert state.conflict and r @ f > 0
  assert abs(u @ r) <= 1e-12 * np.linalg.norm(r) * np.linalg.norm(f)
  assert u @ f < 0  # descending the result raises the forget loss
  # Nothing but the component along g_r is gone.
  np.testing.assert_allclose(-u + (r @ f) / (r @ r) * r, f, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_pcgrad_averages_both_projections(x64, seed):
  retain, forget = _trees(seed, conflict=True)
  updates, state = _update(pcgrad(), retain, forget)
  r, a = _flat(retain), -_flat(forget)  # the gradients that are descended
  assert state.conflict and r @ a < 0
  projected = [r - (r @ a) / (a @ a) * a, a - (r @ a) / (r @ r) * r]
  np.testing.assert_allclose(_flat(updates), np.mean(projected, axis=0), rtol=1e-11)
  assert _flat(updates) @ r > 0 and _flat(updates) @ a > 0


@pytest.mark.parametrize("name, expected", [("gru", lambda r, f: -f), ("pcgrad", lambda r, f: (r - f) / 2)])
def test_without_conflict_nothing_is_projected(x64, name, expected):
  retain, forget = _trees(0, conflict=False)
  updates, state = _update(TRANSFORMS[name](), retain, forget)
  assert not state.conflict
  np.testing.assert_allclose(_flat(updates), expected(_flat(retain), _flat(forget)), rtol=1e-12)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_reference_sign_swaps_the_two_cases(x64, name):
  for conflict in (True, False):
    retain, forget = _trees(1, conflict)
    state = _update(TRANSFORMS[name](reference_sign=True), retain, forget)[1]
    assert bool(state.conflict) != conflict


@pytest.mark.parametrize("name", TRANSFORMS)
def test_max_norm_scales_down_only(x64, name):
  retain, forget = _trees(2, conflict=True)
  free = _flat(_update(TRANSFORMS[name](), retain, forget)[0])
  norm = np.linalg.norm(free)
  for max_norm, factor in ((0.25 * norm, 0.25), (4 * norm, 1.0)):
    bounded = _flat(_update(TRANSFORMS[name](max_norm=max_norm), retain, forget)[0])
    np.testing.assert_allclose(bounded, factor * free, rtol=1e-12)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_zero_gradients(x64, name, dtype):
  ones, zeros = {"w": jnp.ones(3, dtype)}, {"w": jnp.zeros(3, dtype)}
  tx = TRANSFORMS[name](max_norm=0.5)
  for retain, forget, expected in (
    (zeros, zeros, 0),
    (ones, zeros, 0 if name == "gru" else 0.5 / 3**0.5),
    (zeros, ones, -0.5 / 3**0.5),
    (ones, ones, 0),  # parallel: nothing is left to ascend
  ):
    updates, _ = _update(tx, retain, forget)
    assert updates["w"].dtype == dtype
    np.testing.assert_allclose(updates["w"], np.full(3, expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_state_is_a_loop_carry_with_per_tensor_diagnostics(x64, name):
  retain, forget = _trees(3, conflict=True)
  tx = TRANSFORMS[name](max_norm=1.0)

  def body(state, _):
    updates, state = tx.update(retain, state, forget_grads=forget)
    return state, updates

  state, _ = jax.lax.scan(body, tx.init(retain), length=2)
  assert state.conflict
  for t, leaf in enumerate(("a", "b")):
    r, f = np.ravel(retain[leaf]), np.ravel(forget[leaf])
    cosine = r @ f / np.linalg.norm(r) / np.linalg.norm(f)
    seen = [x[t] for x in state.diagnostics]
    expected = [np.degrees(np.arccos(cosine)), np.linalg.norm(r), np.linalg.norm(f), r @ f]
    # Near 180 degrees rounding costs an arccosine half of its digits.
    np.testing.assert_allclose(seen, expected, rtol=1e-9, atol=2e-6)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_bad_max_norm(name, max_norm):
  with pytest.raises(UserError, match=f"max_norm={max_norm}"):
    TRANSFORMS[name](max_norm=max_norm)
