"""The HAMU step on one block: golden cases, optimality, limits, float32."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hamu_jax.errors import UserError
from hamu_jax.transforms import BRANCHES, hamu_update

# The fixtures used here hold nothing that one example could leave to the next.
FIXTURES = [HealthCheck.function_scoped_fixture]


def _name(update):
  return BRANCHES[int(update.branch)]


def _load(golden):
  cases = json.loads((golden / "hamu/update_cases.json").read_text())["cases"]
  return cases, np.load(golden / "hamu/update_cases.npz")


def _run(case, arrays):
  return hamu_update(
    arrays[case["id"] + ".retain"],
    arrays[case["id"] + ".forget"],
    learning_rate=case["lr"],
    radius=case["radius"],
    constraint=case["constraint"],
    variant=case["variant"],
    use_lr_radius=case["use_lr_radius"],
    on_infeasible="stop" if case["stop_on_infeasible"] else "exceed",
  )


def test_golden_updates(golden, x64):
  """Every single-block update of the published implementation, and its diagnostics."""
  cases, arrays = _load(golden)
  assert len(cases) == 150
  for case in cases:
    update, expected = _run(case, arrays), arrays[case["id"] + ".update"]
    label = f"{case['id']} {case['tag']}"
    rtol = 1e-9 if case["dtype"] == "float64" else 1e-5
    assert update.delta.dtype == expected.dtype, label
    assert bool(update.infeasible) == case["failed_feasibility"], label
    if case["nan_in_delta"]:
      assert not np.any(update.delta), label
    else:
      atol = rtol * np.abs(expected).max()
      np.testing.assert_allclose(update.delta, expected, rtol=0, atol=atol, err_msg=label)
    if not case["exact_boundary"]:
      # Stopping, the reference forgets why: a zero forget gradient is merely infeasible there.
      vague = case["nan_in_delta"] and case["tag"].startswith("zero_forget")
      assert _name(update) == ("zero_forget_grad" if vague else case["branch"]), label
    for field, value in case["diagnostics"].items():
      # The angle of the reference is an arc cosine, good to 1e-5 degrees near 0 and 180.
      near_pole = field == "angle" and min(value, 180 - value) < 1
      np.testing.assert_allclose(
        getattr(update, field), value, rtol=rtol, atol=1e-5 if near_pole else 1e-12, err_msg=label
      )


def _problem(seed, size, cosine, scales):
  """Gradients with this cosine between them (+-1 for size 1) and these norms."""
  rng = np.random.default_rng(seed)
  if size == 1:
    return np.array([scales[0] * np.sign(cosine + 1e-9)]), np.array([scales[1]]), rng
  basis, _ = np.linalg.qr(rng.normal(size=[size, 2]))
  retain = cosine * basis[:, 0] + np.sqrt(1 - cosine**2) * basis[:, 1]
  return scales[0] * retain, scales[1] * basis[:, 0], rng


PROBLEMS = dict(
  seed=st.integers(0, 2**32 - 1),
  size=st.sampled_from([1, 2, 3, 40]),
  cosine=st.floats(-0.9999, 0.9999),
  scales=st.tuples(*[st.floats(-3, 3).map(lambda e: 10.0**e)] * 2),
  radius=st.floats(-4, 2).map(lambda e: 10.0**e),
  fraction=st.floats(0, 0.99),
)


@settings(deadline=None, max_examples=150, suppress_health_check=FIXTURES)
@given(**PROBLEMS)
def test_solves_its_problem(x64, assert_optimal, seed, size, cosine, scales, radius, fraction):
  retain, forget, rng = _problem(seed, size, cosine, scales)
  constraint = fraction * radius * scales[1]
  update = hamu_update(retain, forget, learning_rate=0.0, radius=radius, constraint=constraint)
  assert not update.infeasible
  assert_optimal(update.delta, retain, forget, radius=radius, constraint=constraint, rng=rng)


@settings(deadline=None, max_examples=50, suppress_health_check=FIXTURES)
@given(**PROBLEMS)
def test_hamu_u_raises_forget_loss_under_a_retain_guarantee(
  x64, assert_optimal, seed, size, cosine, scales, radius, fraction
):
  """hamu-u maximises g_f.d with -g_r.d >= c, and is hamu-q of the swapped negated gradients."""
  retain, forget, rng = _problem(seed, size, cosine, scales)
  constraint = fraction * radius * scales[0]
  common = dict(learning_rate=0.0, radius=radius, constraint=constraint)
  update = hamu_update(retain, forget, variant="hamu-u", **common)
  assert_optimal(update.delta, -forget, -retain, radius=radius, constraint=constraint, rng=rng)
  swapped = hamu_update(-forget, -retain, variant="hamu-q", **common)
  for mine, other in zip(update, swapped, strict=True):
    np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("variant", ["hamu-q", "hamu-u"])
def test_learning_rate_radius_is_the_plain_descent_step(x64, variant):
  """Opposed roles need no compromise: the step is the plain one at the learning rate."""
  gradient = np.random.default_rng(0).normal(size=[4, 3])
  opposed = -2.0 * gradient + 0.01
  update = hamu_update(
    gradient,
    opposed,
    learning_rate=0.3,
    radius=None,
    constraint=1e-3,
    variant=variant,
    use_lr_radius=True,
  )
  assert _name(update) == "direct"
  expected = -0.3 * gradient if variant == "hamu-q" else 0.3 * opposed
  np.testing.assert_allclose(update.delta, expected, rtol=1e-12)


RETAIN, FORGET = np.array([3.0, 0.0, 4.0]), np.array([0.0, 2.0, 0.0])
ZERO = np.zeros(3)


@pytest.mark.parametrize(
  "retain, forget, constraint, branch, expected",
  [
    # Constraint 0: descend if that does not hurt, else slide along the forget level set.
    (RETAIN, FORGET, 0.0, "direct", -RETAIN / 10),
    (RETAIN, -RETAIN, 0.0, "direct", -RETAIN / 10),
    (RETAIN, np.array([1.0, 0.0, 0.0]), 0.0, "rectified", [0, 0, -0.5]),
    (RETAIN, RETAIN, 0.0, "colinear", ZERO),
    # Orthogonal: 3-4-5 with c / |g_f| = 0.3 of R = 0.5.
    (RETAIN, FORGET, 0.6, "rectified", [-0.4 * 0.6, 0.3, -0.4 * 0.8]),
    # Parallel: the least step that keeps the promise; antiparallel: nothing to give up.
    (RETAIN, 2 * RETAIN, 2.0, "colinear", RETAIN / 25),
    (RETAIN, -2 * RETAIN, 2.0, "direct", -RETAIN / 10),
    # Zero gradients of either role.
    (ZERO, FORGET, 0.6, "colinear", [0, 0.3, 0]),
    (ZERO, FORGET, 0.0, "colinear", ZERO),
    (RETAIN, ZERO, 0.0, "direct", -RETAIN / 10),
    (RETAIN, ZERO, 0.6, "zero_forget_grad", ZERO),
    (ZERO, ZERO, 0.0, "direct", ZERO),
    (RETAIN, FORGET, 1.01, "infeasible", ZERO),
    # Exactly on the edge of the ball there is one feasible step.
    (RETAIN, FORGET, 1.0, "rectified", [0, 0.5, 0]),
  ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limits(x64, retain, forget, constraint, branch, expected, dtype):
  update = hamu_update(
    np.asarray(retain, dtype),
    np.asarray(forget, dtype),
    learning_rate=1.0,
    radius=0.5,
    constraint=constraint,
  )
  assert _name(update) == branch
  assert bool(update.infeasible) == (branch in ("zero_forget_grad", "infeasible"))
  assert all(x.dtype == dtype for x in (update.delta, update.angle, update.dot))
  tolerance = 4 * np.finfo(dtype).eps
  np.testing.assert_allclose(update.delta, expected, rtol=tolerance, atol=tolerance)
  assert np.all(np.isfinite(update.feasibility)) and np.all(np.isfinite(update.threshold))


def test_zero_retain_gradient_with_the_learning_rate_radius(x64):
  """R = 0: nothing can be promised, and without a promise nothing moves."""
  common = dict(learning_rate=0.1, radius=None, use_lr_radius=True)
  still = hamu_update(ZERO, FORGET, constraint=0.0, **common)
  assert not still.infeasible and not np.any(still.delta)
  assert _name(hamu_update(ZERO, FORGET, constraint=1e-3, **common)) == "infeasible"


@pytest.mark.parametrize(
  "on_infeasible, forget, expected",
  [
    ("stop", FORGET, ZERO),
    ("project", FORGET, [0, 0.5, 0]),
    ("exceed", FORGET, [0, 1.5, 0]),
    ("stop", ZERO, ZERO),
    ("project", ZERO, ZERO),
    ("exceed", ZERO, ZERO),
  ],
)
def test_infeasible(x64, on_infeasible, forget, expected):
  update = hamu_update(
    RETAIN, forget, learning_rate=1.0, radius=0.5, constraint=3.0, on_infeasible=on_infeasible
  )
  assert update.infeasible
  np.testing.assert_allclose(update.delta, expected, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 17, 100_000])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e3])
def test_float32_parallel_gradients_step_along_no_noise(size, sign, scale):
  """Parallel up to rounding, heavy-tailed: an absolute test would see an orthogonal part."""
  rng = np.random.default_rng(size)
  direction = rng.standard_t(2, size=size)
  retain = np.asarray(0.7133 * scale * direction, np.float32)
  forget = np.asarray(sign * 0.3191 * scale * direction, np.float32)
  forget_norm = np.linalg.norm(forget.astype(np.float64))
  constraint = 0.4 * 0.01 * forget_norm
  update = hamu_update(retain, forget, learning_rate=0.0, radius=0.01, constraint=constraint)
  if sign == 1:
    expected = 0.4 * 0.01 * forget.astype(np.float64) / forget_norm
  else:
    expected = 0.01 * forget.astype(np.float64) / forget_norm
  assert _name(update) == ("colinear" if sign == 1 else "direct")
  error = np.linalg.norm(np.asarray(update.delta, np.float64) - expected)
  assert error <= 1e-6 * 0.01


@pytest.mark.parametrize("size", [3, 100_000])
@pytest.mark.parametrize("sine", [1e-4, 1e-2])
def test_float32_nearly_parallel_gradients_keep_both_constraints(assert_optimal, size, sine):
  """Above the rounding, the small orthogonal part is followed, and orthogonally."""
  rng = np.random.default_rng(size)
  basis, _ = np.linalg.qr(rng.normal(size=[size, 2]))
  forget = np.asarray(3 * basis[:, 0], np.float32)
  retain = np.asarray(basis[:, 0] + sine * basis[:, 1], np.float32)
  constraint = 0.2 * 0.1 * 3
  update = hamu_update(retain, forget, learning_rate=0.0, radius=0.1, constraint=constraint)
  assert _name(update) == "rectified"
  assert_optimal(update.delta, retain, forget, radius=0.1, constraint=constraint * (1 - 1e-5), rtol=3e-6)


@pytest.mark.parametrize("scale", [1e-15, 1e-20, 1e-30])
@pytest.mark.parametrize("size", [5, 100_000])
def test_float32_tiny_gradients_keep_their_direction(scale, size):
  """Squares of such entries underflow in float32; the step must not see it."""
  rng = np.random.default_rng(size)
  large, forget = (rng.normal(size=size).astype(np.float32) for _ in range(2))
  retain = np.float32(scale) * large
  update = hamu_update(retain, forget, learning_rate=0.0, radius=0.5, constraint=0.0)
  r, f = retain.astype(np.float64) / scale, forget.astype(np.float64)
  if r @ f > 0:
    r = r - (r @ f) / (f @ f) * f
  expected = -0.5 * r / np.linalg.norm(r)
  error = np.linalg.norm(np.asarray(update.delta, np.float64) - expected)
  assert error <= 2e-6 * 0.5
  np.testing.assert_allclose(update.retain_norm, np.linalg.norm(retain.astype(np.float64)), 1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["retain", "forget", "constraint", "radius"])
def test_nonfinite_input_is_flagged_and_moves_nothing(bad, where):
  one_bad_entry = jnp.array([1.0, 2.0, bad])
  inputs = dict(
    retain=jnp.ones(3),
    forget=jnp.arange(3.0),
    constraint=jnp.asarray(0.1),
    radius=jnp.asarray(1.0),
  )
  inputs[where] = one_bad_entry if where in ("retain", "forget") else jnp.asarray(bad)
  update = hamu_update(learning_rate=1.0, on_infeasible="exceed", **inputs)
  assert _name(update) == "nonfinite" and update.infeasible
  np.testing.assert_array_equal(update.delta, np.zeros(3))


def test_a_pytree_is_one_vector(x64):
  rng = np.random.default_rng(3)
  shapes = {"a": (2, 3), "b": (), "c": (4,)}
  retain, forget = ({k: rng.normal(size=s) for k, s in shapes.items()} for _ in range(2))
  flat = [np.concatenate([np.ravel(x) for x in g.values()]) for g in (retain, forget)]
  common = dict(learning_rate=1.0, radius=0.3, constraint=0.2)
  tree, vector = hamu_update(retain, forget, **common), hamu_update(*flat, **common)
  joined = np.concatenate([np.ravel(x) for x in tree.delta.values()])
  np.testing.assert_allclose(joined, vector.delta, rtol=1e-12)
  assert jax.tree.map(np.shape, tree.delta) == shapes
  np.testing.assert_allclose(tree.dot, flat[0] @ flat[1], rtol=1e-12)


def test_half_precision_blocks_are_computed_in_float32():
  retain, forget = jnp.ones(64, jnp.bfloat16), jnp.full(64, 0.3, jnp.bfloat16)
  update = hamu_update(retain, forget, learning_rate=1.0, radius=1.0, constraint=0.5)
  assert update.delta.dtype == jnp.bfloat16 and update.dot.dtype == jnp.float32
  assert _name(update) == "colinear"


@pytest.mark.parametrize("retain", [RETAIN, ZERO, FORGET, -FORGET])
@pytest.mark.parametrize("forget", [FORGET, ZERO])
@pytest.mark.parametrize("constraint", [0.0, 0.6, 9.0])
def test_derivatives_of_unselected_branches_do_not_leak(x64, retain, forget, constraint):
  def loss(retain, forget, constraint):
    update = hamu_update(retain, forget, learning_rate=1.0, radius=0.5, constraint=constraint)
    return jnp.sum(update.delta) + update.feasibility + update.threshold + update.angle

  gradients = jax.grad(loss, argnums=(0, 1, 2))(retain, forget, jnp.asarray(constraint))
  assert all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(variant="hamu"), ["variant", "'hamu'", "hamu-q, hamu-u"]),
    (dict(on_infeasible="skip"), ["on_infeasible", "'skip'", "stop, project, exceed"]),
    (dict(constraint=-0.1), ["constraint", "-0.1"]),
    (dict(learning_rate=float("nan")), ["learning_rate", "nan"]),
    (dict(radius=-1.0), ["radius", "-1.0"]),
    (dict(radius=None), ["radius", "use_lr_radius"]),
  ],
)
def test_bad_arguments(change, words):
  arguments = dict(learning_rate=0.1, radius=1.0, constraint=0.0) | change
  with pytest.raises(UserError) as error:
    hamu_update(jnp.ones(2), jnp.ones(2), **arguments)
  assert all(word in str(error.value) for word in words)
  assert "\n" not in str(error.value)
