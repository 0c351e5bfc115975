"""Batch orders: the reference's, and the invariants that resuming and epochs rest on."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from hamu_jax.data import make_split, pass_plan, training_plan, unlearning_plan
from hamu_jax.errors import UserError
from hamu_jax.paired import Paired

SPLIT = Paired(np.arange(57, dtype=np.int32), np.arange(100, 131, dtype=np.int32))
ROLES_OF = {"ft": "retain", "ga": "forget"}


def _valid(indices):
  return indices[indices >= 0]


def _plan(roles, split, batch_size, seed, repeats=1):
  if roles == "plain":
    return training_plan(split.retain, batch_size=batch_size, seed=seed)
  return unlearning_plan(split, roles, batch_size=batch_size, seed=seed, repeats=repeats)


@pytest.mark.parametrize("case", range(26))
def test_shuffled_sets_are_the_reference(golden, case):
  with np.load(golden / "hamu" / "data.npz") as data:
    split = Paired(data[f"splits/{case}/retain"], data[f"splits/{case}/forget"])
    expected = data[f"splits/{case}/retain_shuffled"], data[f"splits/{case}/forget_shuffled"]
    seed = int(data[f"splits/{case}/case"][1])
  plan = unlearning_plan(split, "paired", batch_size=40, seed=seed)
  epoch = plan.indices(0, plan.steps_per_epoch)
  np.testing.assert_array_equal(_valid(epoch.retain), expected[0])
  np.testing.assert_array_equal(_valid(epoch.forget)[: len(expected[1])], expected[1])


@pytest.mark.parametrize("case", range(7))
def test_runs_see_the_rows_of_the_reference_command_line(golden, case):
  with np.load(golden / "hamu" / "data.npz") as data:
    labels, method = data["cli_order/train_labels"], str(data[f"cli_order/{case}/method"])
    rho, seed, forget_class, epochs, repeats, batch_size, _ = data[f"cli_order/{case}/case"]
    expected = {
      role: data[f"cli_order/{case}/{role}"]
      for role in ("retain", "forget", "train")
      if f"cli_order/{case}/{role}" in data
    }
  split = make_split(
    "hard_probability",
    labels,
    seed=int(seed),
    forget_class=(int(forget_class),),
    hard_probability=rho,
  )
  options = {"batch_size": int(batch_size), "seed": int(seed)}
  if method == "none":
    plan = training_plan(np.concatenate(split), reshuffle=False, **options)
  else:
    roles = ROLES_OF.get(method, "paired")
    plan = unlearning_plan(split, roles, repeats=int(repeats), **options)
  indices = plan.indices(0, plan.num_steps(int(epochs)))
  if "train" in expected:
    got = {"train": indices.forget if method == "ga" else indices.retain}
    assert (indices.retain if method == "ga" else indices.forget) is None
  else:
    got = indices._asdict()
  assert got.keys() == expected.keys()
  for role, value in expected.items():
    np.testing.assert_array_equal(got[role], value)
    assert got[role].dtype == np.int32


@pytest.mark.parametrize(
  "roles, run", [("paired", "hamu-q_equal_sgd"), ("retain", "ft_sgd"), ("forget", "ga_sgd")]
)
def test_cutting_into_batches_is_the_reference_trajectories(golden, roles, run):
  # These runs do not shuffle, so our examples are compared through the shuffled order.
  plan = unlearning_plan(Paired(SPLIT.retain, SPLIT.forget - 100), roles, batch_size=12, seed=7)
  indices = plan.indices(0, 25)
  with np.load(golden / "hamu" / "data.npz") as data:
    for role, got in indices._asdict().items():
      if got is None:
        continue
      expected = data[f"trajectories/{run}/{role}_idx"]
      order = _valid(got)[: expected.max() + 1]
      assert len(set(order)) == expected.max() + 1
      np.testing.assert_array_equal(got, np.where(expected >= 0, order[expected], -1))


PLANS = {
  "roles": st.sampled_from(["paired", "retain", "forget", "plain"]),
  "retain": st.integers(1, 40),
  "forget": st.integers(1, 40),
  "batch_size": st.integers(1, 45),
  "seed": st.integers(0, 2**32),
}


def _split(retain, forget):
  return Paired(np.arange(retain), np.arange(1000, 1000 + forget))


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(**PLANS, cuts=st.lists(st.integers(0, 200), min_size=3, max_size=3))
def test_rows_depend_only_on_the_step_number(roles, retain, forget, batch_size, seed, cuts):
  start, middle, stop = sorted(cuts)
  plan = _plan(roles, _split(retain, forget), batch_size, seed)
  whole, left, right = plan.indices(start, stop), plan.indices(start, middle), plan.indices(middle, stop)
  for one, two, three in zip(whole, left, right, strict=True):
    if one is not None:
      np.testing.assert_array_equal(one, np.concatenate([two, three]))


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(**PLANS, epoch=st.integers(0, 5), repeats=st.integers(1, 3))
def test_each_epoch_sees_each_row_equally_often(roles, retain, forget, batch_size, seed, epoch, repeats):
  split = _split(retain, forget)
  plan = _plan(roles, split, batch_size, seed, repeats)
  indices = plan.indices(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
  times = {
    "plain": 1,
    "paired": repeats,
    "retain": 2 * repeats,
    "forget": 2 * max(1, retain // forget) * repeats,
  }[roles]
  own = indices.forget if roles == "forget" else indices.retain
  values, counts = np.unique(_valid(own), return_counts=True)
  np.testing.assert_array_equal(values, split.forget if roles == "forget" else split.retain)
  assert (counts == times).all()
  # Only the last batch is short, and only at its end.
  assert (own[:-1] >= 0).all() and own[-1, 0] >= 0
  assert (np.diff((own[-1] >= 0).astype(int)) <= 0).all()


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(retain=st.integers(1, 40), forget=st.integers(1, 40), batch_size=st.integers(1, 40))
def test_forget_cycles_on_across_epochs_in_one_order(retain, forget, batch_size):
  plan = _plan("paired", _split(retain, forget), batch_size, 3)
  period = -(-forget // batch_size)
  indices = plan.indices(0, 3 * plan.steps_per_epoch + period).forget
  np.testing.assert_array_equal(indices[period:], indices[:-period])
  np.testing.assert_array_equal(np.sort(_valid(indices[:period])), 1000 + np.arange(forget))


def test_training_reshuffles_each_epoch_by_seed_and_epoch():
  plan = training_plan(SPLIT.retain, batch_size=12, seed=9)
  for epoch in range(3):
    indices = plan.indices(epoch * 5, epoch * 5 + 5)
    np.testing.assert_array_equal(_valid(indices.retain), np.random.default_rng((9, epoch)).permutation(57))
    assert indices.forget is None


def test_repeated_rows_stay_repeated():
  indices = np.array([3, 3, 8])
  for reshuffle in (True, False):
    plan = training_plan(indices, batch_size=2, seed=0, reshuffle=reshuffle)
    assert sorted(_valid(plan.indices(0, 2).retain)) == [3, 3, 8]


@pytest.mark.parametrize(
  "epochs, repeats, steps",
  [(3, 1, 15), (0.5, 1, 3), (0.2, 1, 1), (25.0, 1, 125), (5, 2, 20), (1, 2, 10)],
)
def test_num_steps(epochs, repeats, steps):
  plan = unlearning_plan(SPLIT, "paired", batch_size=12, seed=0, repeats=repeats)
  assert plan.num_steps(epochs) == steps


def test_a_batch_that_is_larger_than_its_set_is_padded_with_a_note(capsys):
  training_plan(SPLIT.retain, batch_size=57, seed=0)
  unlearning_plan(SPLIT, "paired", batch_size=31, seed=0)
  assert capsys.readouterr().err == ""
  plan = training_plan(SPLIT.retain, batch_size=10_000_000, seed=0)
  # No memory is spent on more than the set.
  assert plan.indices(0, 1).retain.shape == (1, 57) and plan.steps_per_epoch == 1
  note = "note: config.train.batch_size=10000000: the training set has 57 examples"
  assert capsys.readouterr().err.startswith(note)
  retain, forget = unlearning_plan(SPLIT, "paired", batch_size=40, seed=0).indices(0, 2)
  assert (retain >= 0).sum() == 57 and sorted(forget[0][forget[0] >= 0]) == sorted(SPLIT.forget)
  assert capsys.readouterr().err.count("note: config.method.batch_size=40: the forget set has 31") == 1


def test_empty_sets_are_refused():
  with pytest.raises(UserError, match="config.train.batch_size=2: the training set has 0 examples; choose"):
    training_plan(SPLIT.retain[:0], batch_size=2, seed=0)


@pytest.mark.parametrize("roles, message", [("both", "choose from paired, retain, forget")])
def test_unknown_roles(roles, message):
  with pytest.raises(UserError, match=message):
    unlearning_plan(SPLIT, roles, batch_size=4, seed=0)


@pytest.mark.parametrize("field, choices", [("shuffle", "each_epoch, once"), ("epoch", "matched, pass")])
def test_unknown_orders(field, choices):
  with pytest.raises(UserError, match=f"^{field}='often': choose from {choices}$"):
    unlearning_plan(SPLIT, "paired", batch_size=4, seed=0, **{field: "often"})


# The sharpness paper's order.

SETS = {"retain": st.integers(1, 40), "forget": st.integers(1, 40), "batch_size": st.integers(1, 40)}


def _passes(length, batch_size):
  return -(-length // batch_size)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(**SETS, seed=st.integers(0, 2**32), epoch=st.integers(0, 4))
def test_pairs_start_over_with_each_epoch(retain, forget, batch_size, seed, epoch):
  """An epoch is one pass over retain, in which forget cycles over the batches of its first pass."""
  split = _split(retain, forget)
  plan = unlearning_plan(
    split,
    "paired",
    batch_size=batch_size,
    seed=seed,
    shuffle="each_epoch",
    epoch="pass",
  )
  length, period = _passes(retain, batch_size), _passes(forget, batch_size)
  assert plan.steps_per_epoch == length
  indices = plan.indices(epoch * length, (epoch + 1) * length)
  np.testing.assert_array_equal(np.sort(_valid(indices.retain)), split.retain)
  np.testing.assert_array_equal(indices.forget[period:], indices.forget[:-period])
  first = _valid(indices.forget[:period])
  # Unless the epoch is over before, its first batches are the whole set.
  assert len(set(first)) == len(first) == min(forget, length * batch_size)
  assert set(first) <= set(split.forget)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(
  **SETS,
  roles=st.sampled_from(["paired", "retain", "forget", "merged"]),
  seed=st.integers(0, 2**32),
  cuts=st.lists(st.integers(0, 200), min_size=3, max_size=3),
)
def test_reordered_rows_depend_only_on_the_step_number(retain, forget, batch_size, roles, seed, cuts):
  plan = unlearning_plan(
    _split(retain, forget),
    roles,
    batch_size=batch_size,
    seed=seed,
    shuffle="each_epoch",
    epoch="pass",
  )
  start, middle, stop = sorted(cuts)
  whole, left, right = plan.indices(start, stop), plan.indices(start, middle), plan.indices(middle, stop)
  for one, two, three in zip(whole, left, right, strict=True):
    if one is not None:
      np.testing.assert_array_equal(one, np.concatenate([two, three]))


def test_pairs_are_reordered_by_seed_and_epoch():
  plan = unlearning_plan(SPLIT, "paired", batch_size=12, seed=9, shuffle="each_epoch")
  # 57 examples to retain make 5 batches, 31 to forget 3.
  epochs = [plan.indices(5 * epoch, 5 * epoch + 5) for epoch in range(3)]
  for role in Paired._fields:
    orders = [_valid(getattr(indices, role))[: len(getattr(SPLIT, role))] for indices in epochs]
    for order in orders:
      np.testing.assert_array_equal(np.sort(order), getattr(SPLIT, role))
    # Random orders have one example in common places, on average.
    assert max(np.sum(orders[0] == orders[1]), np.sum(orders[1] == orders[2])) < 10
  # Of the same length the two sets are not shuffled alike.
  plan = unlearning_plan(_split(40, 40), "paired", batch_size=40, seed=9, shuffle="each_epoch")
  indices = plan.indices(0, 1)
  assert np.sum(indices.retain == indices.forget - 1000) < 10
  # Another seed is another order.
  other = unlearning_plan(SPLIT, "paired", batch_size=12, seed=10, shuffle="each_epoch").indices(0, 5)
  assert np.sum(other.retain == epochs[0].retain) < 15


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(
  **SETS,
  roles=st.sampled_from(["retain", "forget", "merged"]),
  seed=st.integers(0, 2**32),
  epoch=st.integers(0, 4),
  shuffle=st.sampled_from(["each_epoch", "once"]),
  repeats=st.integers(1, 3),
)
def test_an_epoch_of_one_pass(retain, forget, batch_size, roles, seed, epoch, shuffle, repeats):
  split = _split(retain, forget)
  plan = unlearning_plan(
    split,
    roles,
    batch_size=batch_size,
    seed=seed,
    shuffle=shuffle,
    epoch="pass",
    repeats=repeats,
  )
  wanted = np.concatenate(split) if roles == "merged" else getattr(split, roles)
  length = _passes(repeats * len(wanted), batch_size)
  assert plan.steps_per_epoch == length
  indices = plan.indices(epoch * length, (epoch + 1) * length)
  assert (indices.retain is None) == (roles == "forget") and (indices.forget is None) == (roles != "forget")
  (own,) = [role for role in indices if role is not None]
  np.testing.assert_array_equal(np.sort(_valid(own)), np.sort(np.tile(wanted, repeats)))
  np.testing.assert_array_equal(plan.epochs(epoch * length, (epoch + 1) * length), [epoch] * length)


@pytest.mark.parametrize("epoch", ["matched", "pass"])
def test_a_merged_epoch_is_one_shuffled_pass_over_both_sets(epoch):
  options = {"batch_size": 11, "seed": 4, "epoch": epoch}
  plan = unlearning_plan(SPLIT, "merged", shuffle="each_epoch", **options)
  assert plan.num_steps(2) == 16
  orders = [_valid(plan.indices(8 * number, 8 * number + 8).retain) for number in range(2)]
  for order in orders:
    np.testing.assert_array_equal(np.sort(order), np.concatenate(SPLIT))
    # Both sets are spread over the epoch.
    places = np.flatnonzero(order >= 100)
    assert places.min() < 22 and places.max() > 65
  assert np.sum(orders[0] == orders[1]) < 10
  once = unlearning_plan(SPLIT, "merged", shuffle="once", **options)
  np.testing.assert_array_equal(once.indices(0, 8).retain, once.indices(8, 16).retain)


def test_a_merged_batch_holds_both_sets(capsys):
  plan = unlearning_plan(SPLIT, "merged", batch_size=100, seed=0)
  assert sorted(plan.indices(0, 1).retain[0]) == sorted(np.concatenate(SPLIT))
  assert "config.method.batch_size=100: the merged set has 88 examples" in capsys.readouterr().err


# One set after the other.

PASSES = {
  "retain": st.integers(1, 30),
  "forget": st.integers(1, 30),
  "batch_size": st.integers(1, 12),
  "msteps": st.integers(0, 4),
  "seed": st.integers(0, 2**32),
}


def _pass_plan(retain, forget, batch_size, msteps, seed):
  split = _split(retain, forget)
  batch_size = min(batch_size, retain, forget)
  return split, pass_plan(split, ("forget", "retain"), (msteps, None), batch_size=batch_size, seed=seed)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(**PASSES)
def test_forget_is_passed_in_the_first_epochs_and_retain_in_all(retain, forget, batch_size, msteps, seed):
  split, plan = _pass_plan(retain, forget, batch_size, msteps, seed)
  start = 0
  for epoch in range(6):
    for role, other in (("forget", "retain"), ("retain", "forget")):
      if role == "forget" and epoch >= msteps:
        continue
      stop = start + _passes(len(getattr(split, role)), plan.batch_size)
      indices = plan.indices(start, stop)._asdict()
      np.testing.assert_array_equal(np.sort(_valid(indices[role])), getattr(split, role))
      # Each step has a batch of one role.
      assert (indices[role][:, 0] >= 0).all() and (indices[other] == -1).all()
      np.testing.assert_array_equal(plan.epochs(start, stop), [epoch] * (stop - start))
      start = stop
    # The step count that schedules and evaluations go by.
    assert plan.position(epoch + 1) == plan.num_steps(epoch + 1) == start


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(**PASSES, cuts=st.lists(st.integers(0, 80), min_size=3, max_size=3))
def test_passes_depend_only_on_the_step_number(retain, forget, batch_size, msteps, seed, cuts):
  _, plan = _pass_plan(retain, forget, batch_size, msteps, seed)
  start, middle, stop = sorted(cuts)
  for read in (
    lambda *steps: plan.indices(*steps).retain,
    lambda *steps: plan.indices(*steps).forget,
    plan.epochs,
  ):
    whole = read(start, stop)
    np.testing.assert_array_equal(whole, np.concatenate([read(start, middle), read(middle, stop)]))
    for step in range(start, min(stop, start + 5)):
      np.testing.assert_array_equal(read(step, step + 1)[0], whole[step - start])


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(**PASSES, epochs=st.lists(st.floats(0, 6), min_size=2, max_size=2))
def test_positions_within_an_epoch(retain, forget, batch_size, msteps, seed, epochs):
  _, plan = _pass_plan(retain, forget, batch_size, msteps, seed)
  earlier, later = sorted(epochs)
  assert plan.position(earlier) <= plan.position(later)
  steps = plan.num_steps(later)
  assert plan.position(later) - 1e-6 <= steps < plan.position(later) + 1
  # A run of so many epochs does not reach into the one after.
  assert not steps or plan.epochs(0, steps)[-1] <= later


def test_passes_are_reordered_and_the_two_sets_are_not_shuffled_alike():
  split = _split(40, 40)
  indices = pass_plan(split, ("forget", "retain"), (2, None), batch_size=40, seed=3).indices(0, 4)
  first, second = indices.retain[1::2]
  assert np.sum(first == second) < 10
  assert np.sum(indices.forget[0] == indices.forget[2]) < 10
  assert np.sum(first == indices.forget[0] - 1000) < 10


@pytest.mark.parametrize("batch_size, roles", [(32, ["forget"]), (58, ["retain", "forget"])])
def test_a_pass_pads_a_batch_that_is_larger_than_its_set(capsys, batch_size, roles):
  pass_plan(SPLIT, ("forget", "retain"), (4, None), batch_size=batch_size, seed=0)
  err = capsys.readouterr().err
  assert [role for role in SPLIT._fields if f"={batch_size}: the {role} set has" in err] == roles


def test_a_pass_needs_a_batch():
  with pytest.raises(UserError, match="config.method.batch_size=0: must be at least 1"):
    pass_plan(SPLIT, ("forget", "retain"), (4, None), batch_size=0, seed=0)


def test_each_role_may_have_a_batch_size_of_its_own():
  split = _split(57, 1)
  plan = unlearning_plan(split, "paired", batch_size=(20, 1), seed=3)
  assert (plan.steps_per_epoch, plan.num_steps(2)) == (3, 6)
  retain, forget = plan.indices(0, 6)
  assert (retain.shape, forget.shape) == ((6, 20), (6, 1))
  assert sorted(retain[:3][retain[:3] >= 0]) == sorted(split.retain)
  np.testing.assert_array_equal(forget, np.full((6, 1), split.forget[0]))
  # Alone, forget takes about twice the three steps of the pair.
  alone = unlearning_plan(split, "forget", batch_size=(20, 1), seed=3)
  assert alone.streams.forget.batch_size == 1 and alone.steps_per_epoch == 4
  assert unlearning_plan(split, "retain", batch_size=(20, 1), seed=3).steps_per_epoch == 6
