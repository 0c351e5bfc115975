"""HAMU over a whole model: sharing, scopes, stopping, schedules, and its life inside optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hamu_jax.errors import UserError
from hamu_jax.transforms import BRANCHES, Stop, hamu, hamu_update

SHAPES = {"a": (4, 3), "b": (5,), "c": (1,), "d": (2, 2, 2)}
FIXTURES = [HealthCheck.function_scoped_fixture]


def _gradients(seed, scale=1.0):
  """A retain and a forget tree whose tensors differ in size by orders of magnitude."""
  rng = np.random.default_rng(seed)

  def draw(shape):
    return jnp.asarray(scale * 10.0 ** rng.uniform(-1, 1) * rng.normal(size=shape))

  return ({name: draw(shape) for name, shape in SHAPES.items()} for _ in range(2))


def _flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def _norms_and_dots(retain, forget):
  pairs = [(np.ravel(retain[k]), np.ravel(forget[k])) for k in SHAPES]
  return (
    np.array([np.linalg.norm(r) for r, _ in pairs]),
    np.array([np.linalg.norm(f) for _, f in pairs]),
    np.array([r @ f for r, f in pairs]),
  )


@functools.partial(jax.jit, static_argnames=("variant", "scope", "normalize_share"))
def _run(constraint, retain, forget, radius=None, **options):
  """One update at learning rate 0.2, compiled once for all examples."""
  return _update(hamu(0.2, constraint, radius=radius, **options), retain, forget)


def _update(tx, retain, forget, state=None):
  return tx.update(retain, state or tx.init(retain), retain, forget_grads=forget)


@settings(deadline=None, max_examples=40, suppress_health_check=FIXTURES)
@given(seed=st.integers(0, 2**32 - 1), fraction=st.floats(0, 0.95))
@pytest.mark.parametrize("variant", ["hamu-q", "hamu-u"])
def test_every_tensor_solves_its_problem(x64, assert_optimal, variant, seed, fraction):
  retain, forget = _gradients(seed)
  retain_norm, forget_norm, _ = _norms_and_dots(retain, forget)
  weight = retain_norm * forget_norm
  constraint = fraction * 0.2 * weight.sum()
  updates, state = _run(constraint, retain, forget, variant=variant)
  assert state.stop == Stop.NONE
  for t, name in enumerate(SHAPES):
    pair = (retain[name], forget[name])
    assert_optimal(
      -0.2 * updates[name],
      *(pair if variant == "hamu-q" else (-pair[1], -pair[0])),
      radius=0.2 * (retain_norm if variant == "hamu-q" else forget_norm)[t],
      constraint=constraint * weight[t] / weight.sum(),
    )


@settings(deadline=None, max_examples=40, suppress_health_check=FIXTURES)
@given(seed=st.integers(0, 2**32 - 1), fraction=st.floats(0, 0.95))
@pytest.mark.parametrize("radius, normalize", [(None, True), (0.7, False)])
def test_global_scope_solves_the_problem_of_the_whole_model(
  x64, assert_optimal, radius, normalize, seed, fraction
):
  """With all of the constraint, however a model of several blocks would share it."""
  retain, forget = _gradients(seed)
  r, f = _flat(retain), _flat(forget)
  total_radius = 0.2 * np.linalg.norm(r) if radius is None else radius
  constraint = fraction * total_radius * np.linalg.norm(f)
  options = dict(scope="global", normalize_share=normalize)
  updates, state = _run(constraint, retain, forget, radius=radius, **options)
  assert jax.tree.map(np.shape, updates) == SHAPES
  assert_optimal(-0.2 * _flat(updates), r, f, radius=total_radius, constraint=constraint)
  assert all(x.shape == (1,) for x in state.diagnostics[:10])
  np.testing.assert_allclose(state.diagnostics.constraint[0], constraint, atol=1e-300)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("share", ["equal", "grad_norm", "exp_neg_dot"])
@pytest.mark.parametrize("variant", ["hamu-q", "hamu-u"])
def test_sharing(x64, share, normalize, variant):
  retain, forget = _gradients(1, scale=0.3)
  retain_norm, forget_norm, dot = _norms_and_dots(retain, forget)
  weights = dict(equal=np.full(4, 0.25), grad_norm=retain_norm * forget_norm, exp_neg_dot=np.exp(-dot))
  weight = weights[share]
  expected = 1e-3 * (weight / weight.sum() if normalize else weight)
  tx = hamu(
    0.1,
    1e-3,
    share=share,
    normalize_share=normalize,
    on_infeasible="exceed",
    variant=variant,
    radius=0.5,
  )
  updates, state = _update(tx, retain, forget)
  seen = state.diagnostics
  np.testing.assert_allclose(seen.constraint, expected, rtol=1e-12)
  np.testing.assert_allclose(seen.stopping_constraint, expected.sum(), rtol=1e-12)
  for t, name in enumerate(SHAPES):
    block = hamu_update(
      retain[name],
      forget[name],
      learning_rate=0.1,
      radius=0.5,
      constraint=expected[t],
      variant=variant,
      on_infeasible="exceed",
    )
    np.testing.assert_allclose(-0.1 * updates[name], block.delta, rtol=1e-9)
    assert BRANCHES[seen.branch[t]] == BRANCHES[block.branch]


def test_diagnostics(x64):
  """Against NumPy; norms stay with their role in both variants, the rest is the problem's."""
  retain, forget = _gradients(2)
  retain_norm, forget_norm, dot = _norms_and_dots(retain, forget)
  sine = np.sqrt(1 - (dot / retain_norm / forget_norm) ** 2)
  share = retain_norm * forget_norm / (retain_norm @ forget_norm)
  for variant, first, second in (
    ("hamu-q", retain_norm, forget_norm),
    ("hamu-u", forget_norm, retain_norm),
  ):
    _, state = _update(hamu(0.1, 0.04, variant=variant), retain, forget)
    seen = state.diagnostics
    expected = dict(
      retain_norm=retain_norm,
      forget_norm=forget_norm,
      dot=dot,
      angle=np.degrees(np.arccos(dot / retain_norm / forget_norm)),
      radius=0.1 * first,
      constraint=0.04 * share,
      feasibility=0.04 * share / (second * 0.1 * first),
      threshold=-0.04 * share / 0.1,
      stopping_rhs=np.sum(0.1 * first * second * sine),
      stopping_constraint=0.04,
      stopping_margin=0.04 - np.sum(0.1 * first * second * sine),
    )
    for field, value in expected.items():
      # The single-entry tensor is parallel: its arc cosine is good to half the digits only.
      np.testing.assert_allclose(
        getattr(seen, field), value, rtol=1e-9, atol=2e-6 if field == "angle" else 1e-9
      )


@pytest.mark.parametrize(
  "options",
  [
    dict(),
    dict(radius=0.3),
    dict(scope="global"),
    dict(scope="global", radius=0.3, share="exp_neg_dot", normalize_share=False),
    dict(share="equal"),
    dict(share="equal", radius=0.3),
    dict(normalize_share=False),
    dict(share="exp_neg_dot"),
    dict(share="exp_neg_dot", radius=0.3, normalize_share=False),
  ],
  ids=str,
)
@pytest.mark.parametrize("variant", ["hamu-q", "hamu-u"])
def test_feasible_ratio_is_the_edge(x64, options, variant):
  """A whisker below the ratio every block is feasible, a whisker above one is not."""
  retain, forget = _gradients(4)

  def step(constraint):
    return _update(hamu(0.01, constraint, variant=variant, **options), retain, forget)[1]

  ratio = step(1e-3).diagnostics.feasible_ratio
  assert step(0.01 * ratio * (1 - 1e-9)).stop == Stop.NONE
  assert step(0.01 * ratio * (1 + 1e-9)).stop == Stop.INFEASIBLE
  if not options:
    retain_norm, forget_norm, _ = _norms_and_dots(retain, forget)
    np.testing.assert_allclose(ratio, retain_norm @ forget_norm, rtol=1e-12)


def test_feasible_ratio_of_a_forget_gradient_that_counts_as_zero(x64):
  """Its block can promise nothing but the eps that counts as 0."""
  retain, forget = _gradients(4)
  forget["b"] = forget["b"] * 1e-8 / np.linalg.norm(forget["b"])

  def step(constraint):
    return _update(hamu(0.01, constraint, share="equal"), retain, forget)[1]

  np.testing.assert_allclose(step(0.0).diagnostics.feasible_ratio, 4e-12 / 0.01, rtol=1e-12)
  assert step(4e-12 * (1 - 1e-9)).stop == Stop.NONE
  assert step(4e-12 * (1 + 1e-9)).stop == Stop.INFEASIBLE


def test_one_infeasible_block_discards_the_whole_update(x64):
  retain, forget = _gradients(5)
  forget["b"] = 0 * forget["b"]  # its equal share of the constraint cannot be met
  tx = hamu(0.1, 1e-4, share="equal")
  updates, state = _update(tx, retain, forget)
  assert state.stop == Stop.INFEASIBLE and state.count == 0
  assert not np.any(_flat(updates))
  names = [BRANCHES[code] for code in state.diagnostics.branch]
  assert names[1] == "zero_forget_grad" and list(state.diagnostics.infeasible) == [0, 1, 0, 0]
  # Grad-norm sharing asks nothing of that block: it descends freely.
  updates, state = _update(hamu(0.1, 1e-4), retain, forget)
  assert state.stop == Stop.NONE and state.count == 1
  np.testing.assert_allclose(updates["b"], retain["b"], rtol=1e-12)


@pytest.mark.parametrize("on_infeasible", ["project", "exceed"])
def test_infeasible_blocks_by_option_go_on(x64, on_infeasible):
  retain, forget = _gradients(6)
  tx = hamu(0.1, 1e3, on_infeasible=on_infeasible)
  updates, state = _update(tx, retain, forget)
  assert state.stop == Stop.NONE and state.count == 1 and np.all(state.diagnostics.infeasible)
  for t, name in enumerate(SHAPES):
    norm = np.linalg.norm(forget[name])
    radius, constraint = state.diagnostics.radius[t], state.diagnostics.constraint[t]
    length = radius if on_infeasible == "project" else constraint / norm
    np.testing.assert_allclose(-0.1 * updates[name], length * forget[name] / norm, rtol=1e-9)


def test_all_products_zero_is_not_silently_feasible(x64):
  """Without a gradient to weight by, the constraint is shared equally and found infeasible."""
  retain, forget = _gradients(7)
  _, state = _update(hamu(0.1, 1e-4), retain, jax.tree.map(jnp.zeros_like, forget))
  np.testing.assert_allclose(state.diagnostics.constraint, np.full(4, 2.5e-5))
  assert state.stop == Stop.INFEASIBLE


def test_aggregate_criterion(x64):
  retain, forget = _gradients(8)
  retain_norm, forget_norm, dot = _norms_and_dots(retain, forget)
  assert np.any(dot < 0) and np.any(dot > 0)
  sideways = np.sqrt(np.maximum((retain_norm * forget_norm) ** 2 - dot**2, 0))
  published = 0.1 * sideways.sum()
  descent = 0.1 * np.where(dot <= 0, retain_norm * forget_norm, sideways).sum()
  assert published < descent * 0.99

  def stop(constraint, **options):
    return _update(hamu(0.1, constraint, **options), retain, forget)[1]

  between = (published + descent) / 2
  assert stop(between).stop == Stop.NONE and stop(between).diagnostics.stopping_met
  assert stop(between, stop_on_criterion=True).stop == Stop.CRITERION
  assert stop(between, stop_on_criterion=True, criterion="descent").stop == Stop.NONE
  assert stop(published * 0.999, stop_on_criterion=True).stop == Stop.NONE
  assert stop(descent * 1.001, stop_on_criterion=True, criterion="descent").stop == Stop.CRITERION
  updates, state = _update(hamu(0.1, between, stop_on_criterion=True), retain, forget)
  assert not np.any(_flat(updates)) and state.count == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("opposed", [True, False])
def test_descent_criterion_is_where_one_block_stops_descending(x64, seed, opposed):
  """For a single block it is exact: below it the retain loss falls, above it it rises."""
  rng = np.random.default_rng(seed)
  retain, forget = rng.normal(size=[2, 6])
  forget = -forget if (retain @ forget < 0) != opposed else forget

  def step(constraint):
    tx = hamu(0.1, constraint, criterion="descent", on_infeasible="project")
    updates, state = _update(tx, {"w": jnp.asarray(retain)}, {"w": jnp.asarray(forget)})
    return -0.1 * np.asarray(updates["w"]) @ retain, state.diagnostics

  edge = step(0.0)[1].stopping_rhs
  change, seen = step(edge * 0.999)
  assert change < 0 and not seen.stopping_met
  change, seen = step(edge * 1.001)
  assert seen.stopping_met
  assert np.all(seen.infeasible) if opposed else change > 0


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12])
def test_float32_sharing_of_tiny_and_huge_gradients(scale):
  """Products of norms under- and overflow float32, their proportions do not."""
  retain, forget = _gradients(9)
  retain = jax.tree.map(lambda x: np.float32(scale) * x.astype(jnp.float32), retain)
  forget = jax.tree.map(lambda x: np.float32(scale) * x.astype(jnp.float32), forget)
  _, state = _update(hamu(0.1, 1e-3, on_infeasible="exceed", eps=1e-30), retain, forget)
  retain_norm, forget_norm, _ = _norms_and_dots(
    *(jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (retain, forget))
  )
  weight = retain_norm * forget_norm
  np.testing.assert_allclose(state.diagnostics.constraint, 1e-3 * weight / weight.sum(), rtol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_float32_exp_neg_dot_does_not_overflow(normalize):
  """Dots of +-1000 overflow exp in float32."""
  retain = {"a": jnp.full(10, 10.0), "b": jnp.full(10, 10.0), "c": jnp.ones(10)}
  forget = {"a": -retain["a"], "b": retain["b"], "c": jnp.ones(10)}
  tx = hamu(0.1, 1e-3, share="exp_neg_dot", normalize_share=normalize)
  updates, state = _update(tx, retain, forget)
  assert np.all(np.isfinite(state.diagnostics.constraint))
  if normalize:
    np.testing.assert_allclose(state.diagnostics.constraint, [1e-3, 0, 0], atol=1e-12)
    assert state.stop == Stop.NONE and np.all(np.isfinite(_flat(updates)))
  else:
    assert state.stop == Stop.INFEASIBLE
    np.testing.assert_allclose(state.diagnostics.constraint[1], 0, atol=1e-12)
  free = hamu(0.1, 0.0, share="exp_neg_dot", normalize_share=normalize)
  seen = _update(free, retain, forget)[1].diagnostics
  np.testing.assert_array_equal(seen.constraint, np.zeros(3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("variant", ["hamu-q", "hamu-u"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_chain_with_sgd_moves_by_delta(x64, dtype, variant, scope):
  retain, forget = (jax.tree.map(lambda x: x.astype(dtype), tree) for tree in _gradients(10, scale=0.1))
  rate, constraint = 0.05, 1e-4
  tx = optax.chain(hamu(rate, constraint, variant=variant, scope=scope), optax.sgd(rate))
  params = jax.tree.map(jnp.zeros_like, retain)
  updates, state = tx.update(retain, tx.init(params), params, forget_grads=forget)
  moved = optax.apply_updates(params, updates)
  constraints = iter(np.asarray(state[0].diagnostics.constraint))

  def solve(r, f):
    return hamu_update(
      r,
      f,
      learning_rate=rate,
      radius=None,
      use_lr_radius=True,
      constraint=next(constraints),
      variant=variant,
    ).delta

  delta = solve(retain, forget) if scope == "global" else jax.tree.map(solve, retain, forget)
  for name in SHAPES:
    assert moved[name].dtype == dtype
    largest = np.abs(delta[name]).max()
    np.testing.assert_allclose(moved[name], delta[name], rtol=0, atol=4 * np.finfo(dtype).eps * largest)


def test_schedules_act(x64):
  """Rate, constraint and radius are read at the count of updates done; a rate of 0 gives zeros."""
  retain, forget = _gradients(11)

  def rate(count):
    return 0.125 * (1 - count / 2)

  scheduled = hamu(rate, lambda count: rate(count) / 128, radius=lambda count: 0.5 / (1 + count))
  step = jax.jit(lambda state: _update(scheduled, retain, forget, state))
  state = scheduled.init(retain)
  for count in range(3):
    updates, state = step(state)
    assert state.count == count + 1 and state.stop == Stop.NONE
    now = 0.125 * (1 - count / 2)
    np.testing.assert_allclose(state.diagnostics.radius, np.full(4, 0.5 / (1 + count)), rtol=1e-6)
    np.testing.assert_allclose(state.diagnostics.stopping_constraint, now / 128, rtol=1e-12)
    if now:
      fixed = _update(hamu(now, now / 128, radius=0.5 / (1 + count)), retain, forget)[0]
      np.testing.assert_allclose(_flat(updates), _flat(fixed), rtol=1e-9)
  np.testing.assert_array_equal(_flat(updates), np.zeros(26))
  assert np.isinf(state.diagnostics.feasible_ratio)


def test_learning_rate_zero_gives_zeros(x64):
  retain, forget = _gradients(12)
  for options in (dict(), dict(radius=1.0)):
    updates, state = _update(hamu(0.0, 0.0, **options), retain, forget)
    np.testing.assert_array_equal(_flat(updates), np.zeros(26))
    assert state.stop == Stop.NONE and state.count == 1


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_jit_and_vmap_over_hyperparameters_agree_with_single_runs(x64, scope):
  retain, forget = _gradients(13)

  def run(rate, constraint):
    return _update(hamu(rate, constraint, scope=scope), retain, forget)

  rates, constraints = np.array([0.1, 0.1, 0.2, 0.2]), np.array([0.0, 0.01, 0.05, 1e3])
  together = jax.jit(jax.vmap(run))(rates, constraints)
  assert list(together[1].stop) == [Stop.NONE, Stop.NONE, Stop.NONE, Stop.INFEASIBLE]
  for i, (rate, constraint) in enumerate(zip(rates, constraints, strict=True)):
    alone = run(float(rate), float(constraint))
    for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
      np.testing.assert_allclose(x[i], y, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
  "dtype, scope, x64_mode",
  [
    (jnp.float32, "tensor", True),
    (jnp.bfloat16, "tensor", False),
    (jnp.bfloat16, "global", True),
  ],
)
def test_state_is_a_loop_carry(dtype, scope, x64_mode):
  """Same structure, shapes and dtypes before and after, or scan refuses."""
  with jax.enable_x64(x64_mode):
    retain, forget = (jax.tree.map(lambda x: x.astype(dtype), tree) for tree in _gradients(14))
    tx = hamu(lambda count: 0.01 / (1 + count), lambda count: 1e-6, scope=scope)

    def body(carry, _):
      params, state = carry
      updates, state = tx.update(retain, state, params, forget_grads=forget)
      return (optax.apply_updates(params, updates), state), state.stop

    (params, state), stops = jax.lax.scan(body, (retain, tx.init(retain)), length=3)
  assert state.count == 3 and not np.any(stops)
  assert all(x.dtype == dtype for x in jax.tree.leaves(params))
  assert state.diagnostics.angle.dtype == jnp.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("role", ["retain", "forget"])
@pytest.mark.parametrize("on_infeasible, scope", [("stop", "tensor"), ("exceed", "global")])
def test_nonfinite_gradients_stop_and_move_nothing(bad, role, on_infeasible, scope):
  retain, forget = _gradients(15)
  broken = retain if role == "retain" else forget
  broken["d"] = broken["d"].at[0, 1, 0].set(bad)
  tx = hamu(0.1, 1e-4, on_infeasible=on_infeasible, scope=scope)
  updates, state = _update(tx, retain, forget)
  assert state.stop == Stop.NONFINITE and state.count == 0
  assert np.isnan(state.diagnostics.feasible_ratio) and np.any(state.diagnostics.infeasible)
  np.testing.assert_array_equal(_flat(updates), np.zeros(26, np.float32))
  assert "nonfinite" in {BRANCHES[code] for code in state.diagnostics.branch}


def test_nonfinite_hyperparameters_stop():
  retain, forget = _gradients(16)
  for rate, constraint in ((jnp.nan, 0.0), (0.1, jnp.nan), (jnp.inf, 0.0)):
    tx = hamu(jnp.asarray(rate), jnp.asarray(constraint), radius=1.0)
    updates, state = _update(tx, retain, forget)
    assert state.stop == Stop.NONFINITE and not np.any(_flat(updates))


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(variant="q"), ["variant='q'", "hamu-q, hamu-u"]),
    (dict(share="even"), ["share='even'", "equal, grad_norm, exp_neg_dot"]),
    (dict(scope="layer"), ["scope='layer'", "tensor, global"]),
    (dict(on_infeasible="go"), ["on_infeasible='go'", "stop, project, exceed"]),
    (dict(criterion="paper"), ["criterion='paper'", "published, descent"]),
    (dict(constraint=-1e-9), ["constraint=-1e-09"]),
    (dict(learning_rate=-0.1), ["learning_rate=-0.1"]),
    (dict(radius=float("inf")), ["radius=inf"]),
  ],
)
def test_bad_arguments(change, words):
  with pytest.raises(UserError) as error:
    hamu(**dict(learning_rate=0.1, constraint=0.0) | change)
  assert all(word in str(error.value) for word in words)
