"""Where the texts of a chunk of steps are: packed into rows of tokens, window by window."""

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

# Bytes of rows that one window may hold on a device.
_WINDOW_BYTES = 2**26


class _Prepared(NamedTuple):
  """The shape of the packed batches of a plan's first steps."""

  total_steps: int
  shape: packing.Shape


class PackedTexts:
  """Texts as steps read them: for a batch of examples, a batch of the rows that hold them.

  The interface of `feed.ResidentImages`, but a chunk's data is a window of `packing.PackedRows`, and
  its rows are places in it, those in use first. `prepare` comes before all else that is asked of a
  plan; the shapes are then the same for all chunks of it.

  Alternatives are laid out for the forget role only, so that a stage that retains does not depend on them.

  Args:
    data: the training split.
    row_length: tokens of a row; 0 chooses what the batches of a plan waste least of.
    piece: rows that a step computes at a time. It is assumed to skip pieces that are all padding.
  """

  sharded = False

  def __init__(self, data: packing.TextData, row_length: int, piece: int):
    self._packers = Paired(packing.Packer(data._replace(alternatives=None)), packing.Packer(data))
    self._row_length, self._piece = row_length, piece
    self._prepared: dict[Any, _Prepared] = {}

  def prepare(self, plan, total_steps: int) -> None:
    """Fixes the shapes by all batches of a plan's first steps.

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
    """Most steps that a chunk may have: as many as fit a window."""
    shape = self.shape(plan)
    bytes_a_step = sum(role is not None for role in plan.streams) * shape.rows * shape.row_bytes
    return int(np.clip(_WINDOW_BYTES // bytes_a_step, 1, chunk_lib.CHUNK_CAPACITY))

  def chunk(
    self, plan, start: int, stop: int, mesh: jax.sharding.Mesh | None
  ) -> tuple[packing.PackedRows, step_lib.Batches]:
    """The texts and the batches of the steps start..stop-1 of a plan, on the devices of the mesh.

    Returns:
      A window of M = most steps * roles * R rows on each device, and the feed: [n, R] places of
      each role's rows in the window, -1 for padding.
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
    """How many tokens the texts of the steps start..stop-1 have, in both roles."""
    return sum(int(packer.lengths(batch).sum()) for packer, batch in self._batches(plan, start, stop))

  def padding_share(self, plan, total_steps: int) -> float:
    """The share of padding in what the first steps of a plan compute, in whole pieces."""
    self.prepare(plan, total_steps)
    row_length = self.shape(plan).tokens
    computed = 0
    for packer, batch in self._batches(plan, 0, total_steps):
      rows = packing.num_rows(packing.fit(packer.lengths(batch), row_length))
      computed += packing.up_to_multiple(rows, self._piece) * row_length
    return (computed - self.tokens(plan, 0, total_steps)) / max(computed, 1)

  def _batches(self, plan, start: int, stop: int) -> list[tuple[packing.Packer, np.ndarray]]:
    """The dataset rows of each batch of some steps, without padding, and what packs them."""
    return [
      (packer, batch[batch >= 0])
      for packer, role in zip(self._packers, plan.indices(start, stop), strict=True)
      if role is not None
      for batch in role
    ]
