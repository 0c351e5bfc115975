"""Packs texts of any length into rows of one length: whole examples, each a segment of its own.

Shapes: N examples of the dataset, B examples of a batch, M rows, T tokens of a row, P predictions of a
row, S slots of a row (one for each example in it).
"""

import bisect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hamu_jax.data.batching import PADDING
from hamu_jax.data.encoding import Encoded
from hamu_jax.errors import UserError

# Row lengths are multiples of this.
_MULTIPLE = 8
# Largest row length that is considered, in texts of mean length: attention costs T^2.
_MOST_MEAN_TEXTS = 10
# Number of batches on which the padding of a row length is measured, and of row lengths that are tried.
_SAMPLE = 256
_CANDIDATES = 128
# A shorter row length is preferred if it computes at most this share of tokens more than the best one.
_TOLERANCE = 0.005


class TextData(NamedTuple):
  """Encoded texts.

  Attributes:
    examples: the N examples.
    alternatives: N other answers to the same prompts, in the same order, or None.
    forget: [N] bool, whether an example is in the forget set.
  """

  examples: Encoded
  alternatives: Encoded | None
  forget: np.ndarray


class PackedRows(NamedTuple):
  """M rows of tokens and the predictions to make in them.

  Attributes:
    token: [M, T] int32, 0 where padded.
    segment: [M, T] int32, the number of the text in its row, from 1; 0 is padding.
    owner: [M, T] int32, the index i of each token's example in the dataset, or N + i if the token is in
      an alternative; -1 is padding.
    target: [M, P] int32, the position in the row whose output predicts `label`; 0 where padded.
    label: [M, P] int32, the token to predict; 0 where padded.
    slot: [M, P] int32, the slot of the prediction's example; 0 where padded.
    mask: [M, P] bool, whether the prediction is in an example's answer.
    alternative_mask: [M, P] bool, whether the prediction is in an alternative's answer.
    forget: [M, P] bool, whether the prediction's example is in the forget set.
    prediction_row: [M, P] int32, a number that is unique to each predicted token of the dataset; -1
      where padded.
    example_mask: [M, S] bool, whether the slot holds an example.
    row: [M, S] int32, the index of the slot's example in the dataset, or -1.
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
    rows: largest number of rows of a batch.
    tokens: T, tokens of a row.
    predictions: P, predictions of a row.
    slots: S, examples of a row.
  """

  rows: int
  tokens: int
  predictions: int
  slots: int

  def empty(self, rows: int) -> PackedRows:
    """Returns `rows` rows of padding."""
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
    lengths: [n] number of tokens of each text, at most `row_length`.
    row_length: T, tokens of a row.

  Returns:
    [n] int32, the row of each text, numbered from 0 without gaps. Their number is at most 3/2 of the
    smallest possible.

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


def check_row_length(longest: int, wanted: int) -> None:
  """Raises a UserError if the longest example, in tokens, does not fit a row of so many; 0 fits all."""
  if 0 < wanted < longest:
    raise UserError(
      f"config.text.row_length={wanted}: the longest example has {longest} tokens; choose at"
      f" least {longest}, or 0 to choose it automatically"
    )


def choose_row_length(batches: Sequence[np.ndarray], piece: int, wanted: int = 0) -> int:
  """The row length with the least padding, or the shortest one with nearly as little.

  Args:
    batches: for each batch the lengths of its texts in tokens. A sample of the batches is measured.
    piece: number of rows that are computed at a time.
    wanted: row length to take instead, in tokens; 0 chooses one.

  Returns:
    `wanted`, or a multiple of 8 tokens.

  Raises:
    UserError: the longest text does not fit `wanted`.
  """
  longest = max((int(batch.max(initial=1)) for batch in batches), default=1)
  if wanted:
    check_row_length(longest, wanted)
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
  """The number of rows that `fit` used."""
  return int(rows.max(initial=-1)) + 1


class Packer:
  """Packs batches of texts into rows. An alternative follows its example, in the same row.

  Args:
    data: the texts of the dataset.
  """

  def __init__(self, data: TextData):
    self._data = data
    self._kinds = [data.examples] + ([data.alternatives] if data.alternatives is not None else [])
    tokens = np.array([[len(ids) for ids in kind.ids] for kind in self._kinds], np.int64)
    self._lengths = tokens.sum(0)
    self._predictions = self._lengths - sum(kind.answer_start for kind in self._kinds)
    # Number of the first token of each text, in a count over the tokens of all texts.
    self._starts = np.cumsum(tokens).reshape(tokens.shape) - tokens
    if tokens.sum() > np.iinfo(np.int32).max:
      raise UserError(
        f"the texts have {tokens.sum()} tokens; at most 2^31 - 1 can be numbered, so set a smaller"
        " config.text.retain_size"
      )

  def lengths(self, indices: np.ndarray) -> np.ndarray:
    """Number of tokens of each of these examples, its alternative included; padding has 0."""
    return np.where(indices >= 0, self._lengths[np.maximum(indices, 0)], 0)

  def shape(self, batches: Sequence[np.ndarray], row_length: int, piece: int) -> Shape:
    """The smallest shape that holds each of these batches.

    Args:
      batches: for each batch the indices of its examples in the dataset, without padding.
      row_length: T, tokens of a row.
      piece: number of which the rows of a batch are a multiple.
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
    """Packs one batch into rows.

    Args:
      batch: [B] int32 indices of examples in the dataset, -1 for padding.
      shape: static sizes that the batch must fit.

    Returns:
      The rows that the batch needs, at most `shape.rows`. The texts of a row are in the order of the batch.
    """
    batch = batch[batch >= 0]
    placed = fit(self._lengths[batch], shape.tokens)
    packed = shape.empty(num_rows(placed))
    used = np.zeros((3, len(packed.token)), int)  # tokens, predictions and slots in use in each row
    for example, row in zip(batch.tolist(), placed.tolist(), strict=True):
      slot = used[2, row]
      packed.example_mask[row, slot] = True
      packed.row[row, slot] = example
      for kind in range(len(self._kinds)):
        used[:2, row] += self._write(packed, row, slot, used[:2, row], kind, example)
      used[2, row] += 1
    return packed

  def _write(self, packed, row, slot, used, kind, example) -> tuple[int, int]:
    """Appends a text to a row and returns its numbers of tokens and predictions."""
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
