"""The feed of texts, which are packed into rows of tokens, one window of rows for each chunk."""

from typing import Any, NamedTuple

import jax
import numpy as np

from hamu_jax.data import packing
from hamu_jax.data.batching import PADDING
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.placement import place, place_batches
from hamu_jax.paired import Paired

# Largest number of bytes of the rows of a window on a device.
_WINDOW_BYTES = 2**26


class _Prepared(NamedTuple):
  """The shape of the packed batches of the first steps of a plan."""

  total_steps: int
  shape: packing.Shape


class PackedTexts:
  """Packs the examples of each batch into rows of tokens; an `engine.feed.Feed`.

  The data of a chunk is a window of `packing.PackedRows`. The indices of a batch are the places of its rows
  in the window, followed by padding.

  Alternative answers are packed for the forget role only, so a stage of the retain role does not depend on
  them.

  Args:
    data: training split.
    row_length: number of tokens of a row; 0 chooses the length with the least padding over a plan.
    piece: number of rows that a step computes at a time. Steps skip pieces that are all padding.

  Raises:
    UserError: an example is longer than `row_length`.
  """

  sharded = False

  def __init__(self, data: packing.TextData, row_length: int, piece: int):
    self._packers = Paired(packing.Packer(data._replace(alternatives=None)), packing.Packer(data))
    self._row_length, self._piece = row_length, piece
    self._prepared: dict[Any, _Prepared] = {}
    # Before a model is made: the forget role alone has the alternatives, of what is to be forgotten.
    read = Paired(np.arange(len(data.forget)), np.flatnonzero(data.forget))
    for packer, indices in zip(self._packers, read, strict=True):
      packing.check_row_length(int(packer.lengths(indices).max(initial=0)), row_length)

  def prepare(self, plan, total_steps: int) -> None:
    """Determines the shapes from all batches of the first steps of a plan.

    Raises:
      UserError: an example is longer than `row_length`.
    """
    known = self._prepared.get(plan)
    if known is None or known.total_steps < total_steps:
      batches = self._batches(plan, 0, total_steps)
      row_length = packing.choose_row_length(
        [packer.lengths(batch) for packer, batch in batches], self._piece, self._row_length
      )
      shapes = [
        packer.shape([batch for own, batch in batches if own is packer], row_length, self._piece)
        for packer in self._packers
      ]
      self._prepared[plan] = _Prepared(total_steps, packing.Shape(*map(max, *shapes)))

  def shape(self, plan) -> packing.Shape:
    """The static sizes of a plan's batches."""
    return self._prepared[plan].shape

  def most_steps(self, plan) -> int:
    """The largest number of steps that a chunk may have: as many as fit into a window."""
    shape = self.shape(plan)
    bytes_a_step = sum(role is not None for role in plan.streams) * shape.rows * shape.row_bytes
    return int(np.clip(_WINDOW_BYTES // bytes_a_step, 1, chunk_lib.CHUNK_CAPACITY))

  def chunk(
    self, plan, start: int, stop: int, mesh: jax.sharding.Mesh | None
  ) -> tuple[packing.PackedRows, step_lib.Batches]:
    """The texts and the batches of the steps start..stop-1 of a plan, on the devices of the mesh.

    Returns:
      A window of M = most steps * roles * R rows on each device, and the batches: for each role [n, R] places
      of its rows in the window, -1 for padding.
    """
    shape = self.shape(plan)
    batches = plan.indices(start, stop)
    roles = sum(role is not None for role in batches)
    window = shape.empty(self.most_steps(plan) * roles * shape.rows)
    filled = 0

    def packed(packer, role_NxB):
      nonlocal filled
      if role_NxB is None:
        return None
      places_NxR = np.full((len(role_NxB), shape.rows), PADDING, np.int32)
      for places_R, batch in zip(places_NxR, role_NxB, strict=True):
        part = packer.pack(batch, shape)
        count = len(part.token)
        for whole, new in zip(window, part, strict=True):
          whole[filled : filled + count] = new
        places_R[:count] = np.arange(filled, filled + count)
        filled += count
      return places_NxR

    rows: Any = Paired(*map(packed, self._packers, batches))
    if mesh is not None:
      rows = pairing_lib.shard_indices(rows, mesh)
    return place(window, mesh), place_batches(rows, plan.epochs(start, stop), mesh)

  def tokens(self, plan, start: int, stop: int) -> int:
    """The number of tokens of the texts of the steps start..stop-1, in both roles."""
    return sum(int(packer.lengths(batch).sum()) for packer, batch in self._batches(plan, start, stop))

  def padding_share(self, plan, total_steps: int) -> float:
    """The share of padding in the pieces that the first steps of a plan compute."""
    self.prepare(plan, total_steps)
    row_length = self.shape(plan).tokens
    computed = 0
    for packer, batch in self._batches(plan, 0, total_steps):
      rows = packing.num_rows(packing.fit(packer.lengths(batch), row_length))
      computed += packing.up_to_multiple(rows, self._piece) * row_length
    return (computed - self.tokens(plan, 0, total_steps)) / max(computed, 1)

  def _batches(self, plan, start: int, stop: int) -> list[tuple[packing.Packer, np.ndarray]]:
    """The packer and the indices, without padding, of each batch of some steps."""
    return [
      (packer, batch[batch >= 0])
      for packer, role in zip(self._packers, plan.indices(start, stop), strict=True)
      if role is not None
      for batch in role
    ]
