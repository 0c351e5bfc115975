"""Batch orders: the reference's, and the invariants that resuming and epochs rest on."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from hamu_jax.data import make_split, training_plan, unlearning_plan
from hamu_jax.errors import UserError
from hamu_jax.paired import Paired

SPLIT = Paired(np.arange(57, dtype=np.int32), np.arange(100, 131, dtype=np.int32))
ROLES_OF = {"ft": "retain", "ga": "forget"}


def _valid(rows):
  return rows[rows >= 0]


def _plan(roles, split, batch_size, seed, repeats=1):
  if roles == "plain":
    return training_plan(split.retain, batch_size=batch_size, seed=seed)
  return unlearning_plan(
      split, roles, batch_size=batch_size, seed=seed, repeats=repeats, allow_oversized_batch=True
  )


@pytest.mark.parametrize("case", range(26))
def test_shuffled_sets_are_the_reference(golden, case):
  with np.load(golden / "hamu" / "data.npz") as data:
    split = Paired(data[f"splits/{case}/retain"], data[f"splits/{case}/forget"])
    expected = data[f"splits/{case}/retain_shuffled"], data[f"splits/{case}/forget_shuffled"]
    seed = int(data[f"splits/{case}/case"][1])
  plan = unlearning_plan(split, "paired", batch_size=40, seed=seed)
  epoch = plan.rows(0, plan.steps_per_epoch)
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
    options["allow_oversized_batch"] = case == 2  # 6 rows to forget, batches of 8.
    plan = unlearning_plan(split, roles, repeats=int(repeats), **options)
  rows = plan.rows(0, plan.num_steps(int(epochs)))
  if "train" in expected:
    got = {"train": rows.forget if method == "ga" else rows.retain}
    assert (rows.retain if method == "ga" else rows.forget) is None
  else:
    got = rows._asdict()
  assert got.keys() == expected.keys()
  for role, value in expected.items():
    np.testing.assert_array_equal(got[role], value)
    assert got[role].dtype == np.int32


@pytest.mark.parametrize(
    "roles, run", [("paired", "hamu-q_equal_sgd"), ("retain", "ft_sgd"), ("forget", "ga_sgd")]
)
def test_cutting_into_batches_is_the_reference_trajectories(golden, roles, run):
  # These runs do not shuffle, so our rows are compared through the shuffled order.
  plan = unlearning_plan(Paired(SPLIT.retain, SPLIT.forget - 100), roles, batch_size=12, seed=7)
  rows = plan.rows(0, 25)
  with np.load(golden / "hamu" / "data.npz") as data:
    for role, got in rows._asdict().items():
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
  hypothesis.assume(roles != "plain" or batch_size <= retain)
  start, middle, stop = sorted(cuts)
  plan = _plan(roles, _split(retain, forget), batch_size, seed)
  whole, left, right = plan.rows(start, stop), plan.rows(start, middle), plan.rows(middle, stop)
  for one, two, three in zip(whole, left, right, strict=True):
    if one is not None:
      np.testing.assert_array_equal(one, np.concatenate([two, three]))


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(**PLANS, epoch=st.integers(0, 5), repeats=st.integers(1, 3))
def test_each_epoch_sees_each_row_equally_often(
    roles, retain, forget, batch_size, seed, epoch, repeats
):
  hypothesis.assume(roles != "plain" or batch_size <= retain)
  split = _split(retain, forget)
  plan = _plan(roles, split, batch_size, seed, repeats)
  rows = plan.rows(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
  times = {
      "plain": 1,
      "paired": repeats,
      "retain": 2 * repeats,
      "forget": 2 * max(1, retain // forget) * repeats,
  }[roles]
  own = rows.forget if roles == "forget" else rows.retain
  values, counts = np.unique(_valid(own), return_counts=True)
  np.testing.assert_array_equal(values, split.forget if roles == "forget" else split.retain)
  assert (counts == times).all()
  # Only the last batch is short, and only at its end.
  assert (own[:-1] >= 0).all() and own[-1, 0] >= 0
  assert (np.diff((own[-1] >= 0).astype(int)) <= 0).all()


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    retain=st.integers(1, 40), forget=st.integers(1, 40), batch_size=st.integers(1, 40)
)
def test_forget_cycles_on_across_epochs_in_one_order(retain, forget, batch_size):
  plan = _plan("paired", _split(retain, forget), batch_size, 3)
  period = -(-forget // batch_size)
  rows = plan.rows(0, 3 * plan.steps_per_epoch + period).forget
  np.testing.assert_array_equal(rows[period:], rows[:-period])
  np.testing.assert_array_equal(np.sort(_valid(rows[:period])), 1000 + np.arange(forget))


def test_training_reshuffles_each_epoch_by_seed_and_epoch():
  plan = training_plan(SPLIT.retain, batch_size=12, seed=9)
  for epoch in range(3):
    rows = plan.rows(epoch * 5, epoch * 5 + 5)
    np.testing.assert_array_equal(
        _valid(rows.retain), np.random.default_rng((9, epoch)).permutation(57)
    )
    assert rows.forget is None


def test_repeated_rows_stay_repeated():
  rows = np.array([3, 3, 8])
  for reshuffle in (True, False):
    plan = training_plan(rows, batch_size=2, seed=0, reshuffle=reshuffle)
    assert sorted(_valid(plan.rows(0, 2).retain)) == [3, 3, 8]


@pytest.mark.parametrize(
    "epochs, repeats, steps",
    [(3, 1, 15), (0.5, 1, 3), (0.2, 1, 1), (25.0, 1, 125), (5, 2, 20), (1, 2, 10)],
)
def test_num_steps(epochs, repeats, steps):
  plan = unlearning_plan(SPLIT, "paired", batch_size=12, seed=0, repeats=repeats)
  assert plan.num_steps(epochs) == steps


def test_a_batch_may_be_the_whole_set_but_not_more():
  for roles, size in (("paired", 31), ("retain", 57), ("forget", 31)):
    unlearning_plan(SPLIT, roles, batch_size=size, seed=0)
    message = rf"config.method.batch_size={size + 1}: the \w+ set has {size} rows"
    with pytest.raises(UserError, match=message):
      unlearning_plan(SPLIT, roles, batch_size=size + 1, seed=0)
  training_plan(SPLIT.retain, batch_size=57, seed=0)
  with pytest.raises(UserError, match="config.train.batch_size=58: the training set has 57 rows"):
    training_plan(SPLIT.retain, batch_size=58, seed=0)


@pytest.mark.parametrize("roles, message", [("both", "choose from paired, retain, forget")])
def test_unknown_roles(roles, message):
  with pytest.raises(UserError, match=message):
    unlearning_plan(SPLIT, roles, batch_size=4, seed=0)
