"""Texts in rows: nothing lost, nothing mixed, and not more rows than the known bound."""

import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from hamu_jax.data import packing
from hamu_jax.data.encoding import Encoded
from hamu_jax.errors import UserError


def encoded(*lengths_and_starts, offset=0):
  """Texts of which no two tokens are the same."""
  ids, number = [], 1 + offset
  for length, _ in lengths_and_starts:
    ids.append(np.arange(number, number + length, dtype=np.int32))
    number += length
  return Encoded(tuple(ids), np.array([start for _, start in lengths_and_starts], np.int32), 0)


def fewest_rows(lengths, row_length):
  """By trying everything."""

  def place(index, room):
    nonlocal best
    if len(room) >= best:
      return
    if index == len(lengths):
      best = len(room)
      return
    for row, left in enumerate(room):
      if left >= lengths[index]:
        place(index + 1, [*room[:row], left - lengths[index], *room[row + 1 :]])
    place(index + 1, [*room, row_length - lengths[index]])

  best = len(lengths) + 1
  place(0, [])
  return best


@hypothesis.given(st.lists(st.integers(1, 30), max_size=60))
def test_every_text_has_a_row_and_no_row_overflows(lengths):
  rows = packing.fit(np.array(lengths, int), 30)
  assert rows.shape == (len(lengths),)
  used = collections.Counter()
  for row, length in zip(rows.tolist(), lengths):
    used[row] += length
  assert all(tokens <= 30 for tokens in used.values())
  assert sorted(used) == list(range(packing.num_rows(rows)))
  # Any two rows that best fit left have more than a row's tokens together.
  two_least = sorted(used.values())[:2]
  assert len(used) < 2 or sum(two_least) > 30


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.lists(st.integers(1, 20), min_size=1, max_size=7))
def test_rows_are_at_most_half_more_than_the_fewest(lengths):
  rows = packing.num_rows(packing.fit(np.array(lengths), 20))
  fewest = fewest_rows(lengths, 20)
  assert fewest <= rows <= 1.5 * fewest


def test_best_fit_takes_the_fullest_row_with_room():
  # 7 and 6 open rows; 3 fits both, and exactly the first; 4 then fits the second alone.
  np.testing.assert_array_equal(packing.fit(np.array([3, 6, 7, 4]), 10), [0, 1, 0, 1])


def test_a_text_longer_than_a_row_does_not_fit():
  with pytest.raises(ValueError, match="11 tokens does not fit a row of 10"):
    packing.fit(np.array([2, 11]), 10)


def test_a_wanted_row_length_is_taken_or_refused():
  batches = [np.array([5, 9]), np.array([11])]
  assert packing.choose_row_length(batches, 1, 12) == 12
  with pytest.raises(UserError, match="config.text.row_length=10.* 11 tokens") as error:
    packing.choose_row_length(batches, 1, 10)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "length, number, piece, wanted",
  [
    (24, 4, 1, 24),  # a text a row wastes nothing
    (24, 4, 2, 24),
    (20, 6, 1, 40),  # 24 wastes a sixth, two texts in 40 nothing
    (20, 6, 2, 64),  # 3 rows of 40 would be computed as 4; 2 rows of 64 hold 3 texts each
  ],
)
def test_the_row_length_that_wastes_least_is_chosen(length, number, piece, wanted):
  assert packing.choose_row_length([np.full(number, length)] * 3, piece) == wanted


def test_the_longest_text_of_all_fits_although_the_waste_is_of_a_sample():
  batches = [np.array([10])] * 1000
  batches[501] = np.array([333])
  assert packing.choose_row_length(batches, 1) == 336
  assert packing.choose_row_length([], 1) == 8


def test_one_row_by_hand():
  ids = (np.array([5, 6, 7, 8], np.int32), np.array([9, 10], np.int32))
  examples = Encoded(ids, np.array([2, 1]), 0)
  packer = packing.Packer(packing.TextData(examples, None, np.array([False, True])))
  row = packer.pack(np.array([1, -1, 0], np.int32), packing.Shape(1, 8, 4, 3))
  np.testing.assert_array_equal(row.token, [[9, 10, 5, 6, 7, 8, 0, 0]])
  np.testing.assert_array_equal(row.segment, [[1, 1, 2, 2, 2, 2, 0, 0]])
  np.testing.assert_array_equal(row.owner, [[1, 1, 0, 0, 0, 0, -1, -1]])
  np.testing.assert_array_equal(row.target, [[0, 3, 4, 0]])
  np.testing.assert_array_equal(row.label, [[10, 7, 8, 0]])
  np.testing.assert_array_equal(row.slot, [[0, 1, 1, 0]])
  np.testing.assert_array_equal(row.mask, [[True, True, True, False]])
  np.testing.assert_array_equal(row.alternative_mask, [[False] * 4])
  np.testing.assert_array_equal(row.forget, [[True, False, False, False]])
  # Counted through the dataset: text 0 has the tokens 0..3, text 1 has 4 and 5.
  np.testing.assert_array_equal(row.prediction_row, [[5, 2, 3, -1]])
  np.testing.assert_array_equal(row.example_mask, [[True, True, False]])
  np.testing.assert_array_equal(row.row, [[1, 0, -1]])
  assert {array.dtype for array in row} == {np.dtype(np.int32), np.dtype(bool)}


def test_an_alternative_follows_its_example():
  examples, alternatives = encoded((3, 1), (2, 1)), encoded((2, 1), (4, 2), offset=100)
  packer = packing.Packer(packing.TextData(examples, alternatives, np.array([True, False])))
  np.testing.assert_array_equal(packer.lengths(np.array([1, 0, -1])), [6, 5, 0])
  row = packer.pack(np.array([1, 0], np.int32), packing.Shape(1, 12, 7, 2))
  np.testing.assert_array_equal(row.token, [[4, 5, 103, 104, 105, 106, 1, 2, 3, 101, 102, 0]])
  np.testing.assert_array_equal(row.segment, [[1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 0]])
  np.testing.assert_array_equal(row.owner, [[1, 1, 3, 3, 3, 3, 0, 0, 0, 2, 2, -1]])
  np.testing.assert_array_equal(row.label, [[5, 105, 106, 2, 3, 102, 0]])
  np.testing.assert_array_equal(row.target, [[0, 3, 4, 6, 7, 9, 0]])
  np.testing.assert_array_equal(row.slot, [[0, 0, 0, 1, 1, 1, 0]])
  np.testing.assert_array_equal(row.mask, [[True, False, False, True, True, False, False]])
  np.testing.assert_array_equal(row.alternative_mask, [[False, True, True, False, False, True, False]])
  np.testing.assert_array_equal(row.forget, [[False] * 3 + [True] * 3 + [False]])


@hypothesis.settings(deadline=None)
@hypothesis.given(
  st.lists(
    st.integers(2, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))),
    min_size=1,
    max_size=20,
  ),
  st.booleans(),
  st.randoms(use_true_random=False),
)
def test_texts_are_read_back_from_their_rows(texts, with_alternatives, random):
  examples = encoded(*texts)
  alternatives = encoded(*texts[::-1], offset=1000) if with_alternatives else None
  forget = np.array([random.random() < 0.5 for _ in texts])
  packer = packing.Packer(packing.TextData(examples, alternatives, forget))
  batch = np.array(random.sample(range(len(texts)), len(texts)), np.int32)
  shape = packer.shape([batch], 24, 1)
  packed = packer.pack(batch, shape)
  assert shape.rows == len(packed.token) and packed.target.shape[1] == shape.predictions
  seen, numbers = [], []
  for row in range(len(packed.token)):
    present = packed.row[row][packed.example_mask[row]].tolist()
    assert (packed.row[row][~packed.example_mask[row]] == -1).all()
    # The order of the batch within a row.
    assert present == [example for example in batch.tolist() if example in present]
    for slot, example in enumerate(present):
      seen.append(example)
      kinds = [(examples, packed.mask, 0)]
      if with_alternatives:
        kinds.append((alternatives, packed.alternative_mask, len(texts)))
      for kind, (encoded_, mask, owner) in enumerate(kinds):
        segment = slot * len(kinds) + kind + 1
        where = np.flatnonzero(packed.segment[row] == segment)
        np.testing.assert_array_equal(packed.token[row, where], encoded_.ids[example])
        np.testing.assert_array_equal(where, np.arange(where[0], where[-1] + 1))
        assert set(packed.owner[row, where]) == {owner + example}
        own = mask[row] & (packed.slot[row] == slot)
        # Labels are the answer, and each is the token after its target, in its own text.
        target = packed.target[row, own]
        np.testing.assert_array_equal(
          packed.label[row, own], encoded_.ids[example][encoded_.answer_start[example] :]
        )
        np.testing.assert_array_equal(packed.token[row, target + 1], packed.label[row, own])
        assert (packed.segment[row, target] == segment).all()
        assert (packed.segment[row, target + 1] == segment).all()
        assert (packed.forget[row, own] == forget[example]).all()
        numbers += packed.prediction_row[row, own].tolist()
  assert sorted(seen) == list(range(len(texts)))
  assert len(set(numbers)) == len(numbers)
  valid = packed.mask | packed.alternative_mask
  assert not (packed.mask & packed.alternative_mask).any()
  assert (packed.prediction_row[~valid] == -1).all() and (packed.prediction_row[valid] >= 0).all()
  assert ((packed.segment > 0) == (packed.owner >= 0)).all()


def test_a_prediction_has_the_same_number_in_any_batch():
  texts = packing.TextData(encoded((4, 2), (5, 1), (3, 2)), None, np.zeros(3, bool))
  packer = packing.Packer(texts)
  shape = packing.Shape(4, 12, 12, 3)
  of_label = {}
  for batch in ([0, 1], [2, 1], [1, 2, 0]):
    packed = packer.pack(np.array(batch, np.int32), shape)
    for label, number in zip(packed.label[packed.mask], packed.prediction_row[packed.mask]):
      assert of_label.setdefault(label, number) == number
  assert len(set(of_label.values())) == len(of_label) == 2 + 4 + 1


def test_the_shape_holds_the_largest_batches():
  # Tokens 6, 6, 2, 2; answers of 1, 5, 1 and 1 tokens.
  packer = packing.Packer(packing.TextData(encoded((6, 5), (6, 1), (2, 1), (2, 1)), None, np.zeros(4, bool)))
  shape = packer.shape([np.array([0, 1]), np.array([2, 3, 1])], 10, 4)
  assert shape == packing.Shape(rows=4, tokens=10, predictions=8, slots=3)
  empty = shape.empty(2)
  assert shape.row_bytes == sum(array.nbytes for array in empty) // 2 == 10 * 12 + 8 * 19 + 3 * 5
  assert packer.pack(np.array([-1, -1], np.int32), shape).token.shape == (0, 10)
