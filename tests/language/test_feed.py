"""PackedTexts texts of a chunk: what a step gathers is its batch, whole and once."""

import jax
import numpy as np
import pytest

from hamu_jax import data
from hamu_jax.data import packing
from hamu_jax.data.encoding import Encoded
from hamu_jax.engine import pairing
from hamu_jax.errors import UserError
from hamu_jax.language import feed as packed
from hamu_jax.paired import Paired
from hamu_jax.vision import feed

SPLIT = Paired(np.arange(23, dtype=np.int32), np.arange(23, 30, dtype=np.int32))


def text_data(alternatives=False, seed=0):
  rng = np.random.default_rng(seed)

  def encoded():
    lengths = rng.integers(4, 25, 30)
    ids = tuple(rng.integers(1, 999, length).astype(np.int32) for length in lengths)
    return Encoded(ids, rng.integers(1, lengths), 0)

  return packing.TextData(encoded(), encoded() if alternatives else None, np.arange(30) >= 23)


def make_plan(roles="paired", batch_size=5, shuffle="each_epoch"):
  return data.unlearning_plan(SPLIT, roles, batch_size=batch_size, seed=1, shuffle=shuffle)


def gathered(window, places):
  """(dataset row, tokens of its answer) of each example that a step gathers, sorted."""
  window = jax.tree.map(np.asarray, window)
  answers = []
  used = places[places >= 0]
  np.testing.assert_array_equal(places[: len(used)], used)
  for place in used:
    for slot in np.flatnonzero(window.example_mask[place]):
      own = window.mask[place] & (window.slot[place] == slot)
      answers.append((int(window.row[place, slot]), window.label[place, own].tolist()))
  return sorted(answers)


def expected(texts, batch):
  # The joined copies of a set can bring an example into a batch twice.
  return sorted(
    (int(row), texts.examples.ids[row][texts.examples.answer_start[row] :].tolist())
    for row in batch
    if row >= 0
  )


@pytest.mark.parametrize("roles", ["paired", "retain", "forget"])
@pytest.mark.parametrize("alternatives", [False, True])
def test_each_step_gathers_its_examples_once(roles, alternatives):
  texts, plan = text_data(alternatives), make_plan(roles)
  packed_feed = packed.PackedTexts(texts, 0, 2)
  total = 3 * plan.steps_per_epoch  # The last batch of an epoch is short.
  packed_feed.prepare(plan, total)
  shapes = set()
  for start, stop in ((0, 1), (1, 5), (5, 12), (12, total)):
    window, batches = packed_feed.chunk(plan, start, stop, None)
    shapes.add(tuple(leaf.shape for leaf in jax.tree.leaves((window, batches))))
    np.testing.assert_array_equal(batches.epoch[: stop - start], plan.epochs(start, stop))
    for places, batches in zip(batches.indices, plan.indices(start, stop), strict=True):
      assert (places is None) == (batches is None)
      if places is not None:
        places = np.asarray(places)
        assert (places[stop - start :] == -1).all()
        for step, batch in enumerate(batches):
          assert gathered(window, places[step]) == expected(texts, batch)
  assert len(shapes) == 1
  shape = packed_feed.shape(plan)
  assert shape.rows % 2 == 0
  present = sum(role is not None for role in plan.streams)
  assert window.token.shape == (packed_feed.most_steps(plan) * present * shape.rows, shape.tokens)


def test_passes_gather_nothing_of_the_role_whose_turn_it_is_not():
  texts = text_data()
  plan = data.pass_plan(SPLIT, ("forget", "retain"), (None, None), batch_size=5, seed=0)
  packed_feed = packed.PackedTexts(texts, 0, 1)
  packed_feed.prepare(plan, plan.steps_per_epoch)
  window, batches = packed_feed.chunk(plan, 0, plan.steps_per_epoch, None)
  for role in ("retain", "forget"):
    for places, batch in zip(np.asarray(getattr(batches.indices, role)), getattr(plan.indices(0, 7), role)):
      assert gathered(window, places) == expected(texts, batch)
  assert (np.asarray(batches.indices.retain[0]) == -1).all() and (batches.indices.forget[0] >= 0).any()


@pytest.mark.parametrize("groups", [1, 2])
def test_devices_share_the_rows_of_a_batch(groups):
  mesh = pairing.make_mesh(jax.devices()[:4], groups)
  texts, plan = text_data(), make_plan(batch_size=7)
  packed_feed = packed.PackedTexts(texts, 32, 1)
  packed_feed.prepare(plan, 4)
  window, batches = packed_feed.chunk(plan, 0, 4, mesh)
  assert window.token.sharding.is_fully_replicated
  assert len(window.token.sharding.device_set) == 4
  rows = np.asarray(batches.indices)  # [steps, roles, devices a role, b]
  assert rows.shape[1:3] == (2, 4 // groups)
  for step in range(4):
    for role, batches in enumerate(plan.indices(0, 4)):
      # Each device has its rows in front, too, so that it can skip the rest.
      answers = [answer for share in rows[step, role] for answer in gathered(window, share)]
      assert sorted(answers) == expected(texts, batches[step])


def test_as_many_steps_as_fit_a_window(monkeypatch):
  plan = make_plan()
  packed_feed = packed.PackedTexts(text_data(), 32, 1)
  packed_feed.prepare(plan, 5)
  assert packed_feed.most_steps(plan) == 64
  shape = packed_feed.shape(plan)
  monkeypatch.setattr(packed, "_WINDOW_BYTES", 3 * 2 * shape.rows * shape.row_bytes + 1)
  assert packed_feed.most_steps(plan) == 3
  window, _ = packed_feed.chunk(plan, 0, 3, None)
  assert sum(leaf.nbytes for leaf in window) <= packed._WINDOW_BYTES


def test_padding_by_hand():
  # Texts of 6 tokens, rows of 8: a text a row, in pieces of two rows.
  texts = packing.TextData(Encoded((np.ones(6, np.int32),) * 5, np.full(5, 3), 0), None, np.zeros(5, bool))
  plan = data.training_plan(np.arange(5), batch_size=3, seed=0)
  packed_feed = packed.PackedTexts(texts, 8, 2)
  # Steps of 3 and 2 examples: 4 and 2 rows are computed.
  assert packed_feed.padding_share(plan, 2) == pytest.approx(1 - 5 * 6 / (6 * 8))
  assert packed_feed.padding_share(plan, 4) == pytest.approx(1 - 5 * 6 / (6 * 8))
  assert [packed_feed.tokens(plan, 0, 1), packed_feed.tokens(plan, 1, 2)] == [18, 12]
  assert packed_feed.tokens(plan, 0, 4) == 60


def test_tokens_count_both_roles_and_alternatives():
  texts, plan = text_data(alternatives=True), make_plan()
  retain, forget = (role[role >= 0] for role in plan.indices(2, 5))
  wanted = sum(len(texts.examples.ids[row]) for row in [*retain, *forget])
  # A stage that retains must not depend on answers that only some methods read.
  wanted += sum(len(texts.alternatives.ids[row]) for row in forget)
  assert packed.PackedTexts(texts, 0, 1).tokens(plan, 2, 5) == wanted


def test_more_steps_are_prepared_anew_and_fewer_are_not():
  texts, plan = text_data(), make_plan()
  packed_feed = packed.PackedTexts(texts, 0, 1)
  packed_feed.prepare(plan, 1)
  packed_feed.prepare(plan, 40)
  shape = packed_feed.shape(plan)
  packed_feed.prepare(plan, 3)
  assert packed_feed.shape(plan) == shape
  other = packed.PackedTexts(texts, 0, 1)
  other.prepare(plan, 40)
  assert other.shape(plan) == shape


def test_an_example_longer_than_a_row_is_refused():
  with pytest.raises(UserError, match="config.text.row_length=16"):
    packed.PackedTexts(text_data(), 16, 1)


def test_it_has_what_the_loop_asks_of_a_source():
  asked = {name for name in vars(feed.ResidentImages) if not name.startswith("_")}
  assert "chunk" in asked and asked <= set(vars(packed.PackedTexts))
