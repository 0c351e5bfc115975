"""Texts of any length in rows of one length: whole examples side by side, each its own segment.

Shapes: N examples, B of a batch, M rows, T tokens of a row, P predictions of a row, S slots, one
for each example of a row.
"""

import bisect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hamu_jax.data.batching import PADDING
from hamu_jax.data.encoding import Encoded
from hamu_jax.errors import UserError

# Row lengths are multiples of it.
_MULTIPLE = 8
# The longest row that is chosen holds so many texts of mean length: attention costs T^2.
_MOST_MEAN_TEXTS = 10
# Batches by which, and of how many row lengths, the waste is known.
_SAMPLE = 256
_CANDIDATES = 128
# A shorter row may waste so much more of what is computed.
_TOLERANCE = 0.005


class TextData(NamedTuple):
  """Encoded texts.

  Attributes:
    examples: N of them.
    alternatives: other answers to the same prompts, in the same order, or None.
    forget: [N] bool, whether an example is to be forgotten.
  """

  examples: Encoded
  alternatives: Encoded | None
  forget: np.ndarray


class PackedRows(NamedTuple):
  """M rows of tokens and what is to be predicted in them.

  Attributes:
    token: [M, T] int32, 0 where padded.
    segment: [M, T] int32, the number of the text in its row, from 1; 0 is padding.
    owner: [M, T] int32, the dataset row of each token's example, N + row in an alternative; -1 is
      padding.
    target: [M, P] int32, the place in the row whose output predicts `label`; 0 where padded.
    label: [M, P] int32, 0 where padded.
    slot: [M, P] int32, the number of the prediction's example in its row, 0 where padded.
    mask: [M, P] bool, whether it is of an example's answer.
    alternative_mask: [M, P] bool, whether it is of an alternative's.
    forget: [M, P] bool, of the prediction's example.
    prediction_row: [M, P] int32, a number that no other predicted token of the dataset has; -1
      where padded.
    example_mask: [M, S] bool, whether there is an example.
    row: [M, S] int32, its dataset row or -1.
  """

  token: Any
  segment: Any
  owner: Any
  target: Any
  label: Any
  slot: Any
  mask: Any
  alternative_mask: Any
  forget: Any
  prediction_row: Any
  example_mask: Any
  row: Any


_FILL = PackedRows(0, 0, PADDING, 0, 0, 0, False, False, False, PADDING, False, PADDING)
_AXIS = PackedRows(*"TTTPPPPPPPSS")


class Shape(NamedTuple):
  """Static sizes of packed batches.

  Attributes:
    rows: most rows of a batch.
    tokens: T.
    predictions: P.
    slots: S.
  """

  rows: int
  tokens: int
  predictions: int
  slots: int

  def empty(self, rows: int) -> PackedRows:
    """Returns so many rows of padding."""
    sizes = {"T": self.tokens, "P": self.predictions, "S": self.slots}
    return PackedRows(
      *(
        np.full((rows, sizes[axis]), fill, bool if fill is False else np.int32)
        for axis, fill in zip(_AXIS, _FILL, strict=True)
      )
    )

  @property
  def row_bytes(self) -> int:
    """Bytes of one row."""
    return sum(array.nbytes for array in self.empty(1))


def fit(lengths: np.ndarray, row_length: int) -> np.ndarray:
  """Puts texts into few rows by best fit: longest first, each into the fullest row with room.

  Args:
    lengths: [n] tokens of each text, none longer than a row.
    row_length: T.

  Returns:
    [n] int32, the row of each text; rows 0, 1, ... are all used. They are at most 3/2 of the fewest
    possible.

  Source: D. Simchi-Levi, "New worst-case results for the bin-packing problem" (1994).
  """
  lengths = np.asarray(lengths)
  rows = np.empty(len(lengths), np.int32)
  room: list[tuple[int, int]] = []  # (tokens left, row) in ascending order.
  for text in np.argsort(-lengths, kind="stable").tolist():
    length = int(lengths[text])
    if length > row_length:
      raise ValueError(f"a text of {length} tokens does not fit a row of {row_length}")
    place = bisect.bisect_left(room, (length, -1))
    left, row = room.pop(place) if place < len(room) else (row_length, len(room))
    rows[text] = row
    bisect.insort(room, (left - length, row))
  return rows


def choose_row_length(batches: Sequence[np.ndarray], piece: int, wanted: int = 0) -> int:
  """The row length that batches waste least of, the shortest of those that are about as good.

  Args:
    batches: for each batch the lengths of its texts; the waste is that of a sample of them.
    piece: rows that are computed at a time.
    wanted: if not 0, that very length.

  Returns:
    `wanted`, or a multiple of 8 tokens.

  Raises:
    UserError: the longest text does not fit `wanted`.
  """
  longest = max((int(batch.max(initial=1)) for batch in batches), default=1)
  if wanted:
    if longest > wanted:
      raise UserError(
        f"config.text.row_length={wanted}: the longest example has {longest} tokens; choose at"
        f" least {longest}, or 0 to have it chosen"
      )
    return wanted
  chosen = np.linspace(0, len(batches) - 1, min(len(batches), _SAMPLE)).astype(int)
  sample = [batches[at] for at in chosen]
  texts = sum(len(batch) for batch in sample)
  mean = sum(int(batch.sum()) for batch in sample) / max(texts, 1)
  shortest = up_to_multiple(longest, _MULTIPLE)
  limit = max(shortest, int(_MOST_MEAN_TEXTS * mean))
  step = up_to_multiple(max(1, (limit - shortest) // _CANDIDATES), _MULTIPLE)
  candidates = range(shortest, limit + 1, step)
  computed = [
    sum(up_to_multiple(num_rows(fit(batch, length)), piece) for batch in sample) * length
    for length in candidates
  ]
  good = (1 + _TOLERANCE) * min(computed)
  return next(length for length, tokens in zip(candidates, computed) if tokens <= good)


def num_rows(rows: np.ndarray) -> int:
  """How many rows `fit` used."""
  return int(rows.max(initial=-1)) + 1


class Packer:
  """Lays out batches of texts. An alternative follows its example, in the same row.

  Args:
    data: the texts.
  """

  def __init__(self, data: TextData):
    self._data = data
    self._kinds = [data.examples] + ([data.alternatives] if data.alternatives is not None else [])
    tokens = np.array([[len(ids) for ids in kind.ids] for kind in self._kinds], np.int64)
    self._lengths = tokens.sum(0)
    self._predictions = self._lengths - sum(kind.answer_start for kind in self._kinds)
    # Where each text starts, when the tokens of all of them are counted through.
    self._starts = np.cumsum(tokens).reshape(tokens.shape) - tokens
    if tokens.sum() > np.iinfo(np.int32).max:
      raise UserError(f"the texts have {tokens.sum()} tokens; at most 2^31 - 1 can be numbered")

  def lengths(self, rows: np.ndarray) -> np.ndarray:
    """Tokens of these dataset rows, an example and its alternative together; padding has 0."""
    return np.where(rows >= 0, self._lengths[np.maximum(rows, 0)], 0)

  def shape(self, batches: Sequence[np.ndarray], row_length: int, piece: int) -> Shape:
    """The smallest shape that holds each of these batches.

    Args:
      batches: for each batch its dataset rows, without padding.
      row_length: T.
      piece: rows of a batch are a multiple of it.
    """
    rows = predictions = slots = 1
    for batch in batches:
      placed = fit(self._lengths[batch], row_length)
      if len(placed):
        rows = max(rows, num_rows(placed))
        predictions = max(predictions, int(np.bincount(placed, self._predictions[batch]).max()))
        slots = max(slots, int(np.bincount(placed).max()))
    predictions = up_to_multiple(predictions, _MULTIPLE)
    return Shape(up_to_multiple(rows, piece), row_length, predictions, slots)

  def pack(self, batch: np.ndarray, shape: Shape) -> PackedRows:
    """Lays out one batch.

    Args:
      batch: [B] int32 dataset rows, -1 for padding.
      shape: what it must fit.

    Returns:
      The rows that it needs, at most `shape.rows`. Texts of a row have the order of the batch.
    """
    batch = batch[batch >= 0]
    placed = fit(self._lengths[batch], shape.tokens)
    packed = shape.empty(num_rows(placed))
    used = np.zeros((3, len(packed.token)), int)  # Tokens, predictions and slots of each row.
    for example, row in zip(batch.tolist(), placed.tolist(), strict=True):
      slot = used[2, row]
      packed.example_mask[row, slot] = True
      packed.row[row, slot] = example
      for kind in range(len(self._kinds)):
        used[:2, row] += self._write(packed, row, slot, used[:2, row], kind, example)
      used[2, row] += 1
    return packed

  def _write(self, packed, row, slot, used, kind, example) -> tuple[int, int]:
    """Writes a text behind what a row has -> its numbers of tokens and predictions."""
    ids = self._kinds[kind].ids[example]
    first = int(self._kinds[kind].answer_start[example])
    token, prediction = used.tolist()
    place = np.s_[row, token : token + len(ids)]
    packed.token[place] = ids
    packed.segment[place] = slot * len(self._kinds) + kind + 1
    packed.owner[place] = kind * len(self._lengths) + example
    label = ids[first:]
    place = np.s_[row, prediction : prediction + len(label)]
    packed.target[place] = np.arange(token + first - 1, token + first - 1 + len(label))
    packed.label[place] = label
    packed.slot[place] = slot
    (packed.alternative_mask if kind else packed.mask)[place] = True
    packed.forget[place] = self._data.forget[example]
    number = int(self._starts[kind, example]) + first
    packed.prediction_row[place] = np.arange(number, number + len(label))
    return len(ids), len(label)


def up_to_multiple(number: int, multiple: int) -> int:
  """Rounds up."""
  return math.ceil(number / multiple) * multiple
