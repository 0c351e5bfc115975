"""Which rows each step sees: a pure function of the step number, so resuming needs no state.

Order (the reference's): the retain and the forget rows are shuffled once and keep that order. Each
set is cut into batches, the short last one kept; a pass over them follows the other. A pass over
retain is an epoch, hence retain restarts with each epoch while forget cycles on across them.
"""

import dataclasses
import math
import random

import numpy as np

from hamu_jax.errors import UserError
from hamu_jax.paired import Paired

PADDING = -1
# Which sets a method's steps read.
ROLES = ("paired", "retain", "forget")


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
  """Endless passes over some rows.

  Attributes:
    rows: [n] the rows of a pass, in order.
    batch_size: B.
    reshuffle_seed: if not None, pass p is reordered by `default_rng((reshuffle_seed, p))`.
  """

  rows: np.ndarray
  batch_size: int
  reshuffle_seed: int | None = None

  @property
  def steps(self) -> int:
    """Batches in a pass."""
    return -(-len(self.rows) // self.batch_size)

  def _pass(self, number: int) -> np.ndarray:
    """Returns all batches of one pass, [steps, B] int32."""
    rows = self.rows
    if self.reshuffle_seed is not None:
      rows = np.random.default_rng((self.reshuffle_seed, number)).permutation(rows)
    batches = np.full(self.steps * self.batch_size, PADDING, np.int32)
    batches[: len(rows)] = rows
    return batches.reshape(self.steps, self.batch_size)

  def batches(self, start: int, stop: int) -> np.ndarray:
    """Returns the rows of steps start..stop-1, [stop - start, B] int32, -1 = padding."""
    out = np.empty((stop - start, self.batch_size), np.int32)
    for number in range(start // self.steps, -(-stop // self.steps)):
      first = number * self.steps
      low, high = max(start, first), min(stop, first + self.steps)
      out[low - start : high - start] = self._pass(number)[low - first : high - first]
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class BatchPlan:
  """The rows of every step of a run.

  Attributes:
    batch_size: B, rows of a role in a step, padding included.
    streams: Paired streams, None for a role that no step reads.
    repeats: how many times an epoch of this plan goes over the data.
  """

  batch_size: int
  streams: Paired
  repeats: int = 1

  @property
  def steps_per_epoch(self) -> int:
    """Steps of one epoch: a pass over retain or, without retain, over forget."""
    return (self.streams.retain or self.streams.forget).steps

  def num_steps(self, epochs: float) -> int:
    """Steps of a run that goes over the data `epochs` times, a fraction of a step rounded up.

    With `repeats` it is as many of this plan's longer epochs as fit, but at least one.
    """
    if self.repeats > 1:
      epochs = max(1, epochs // self.repeats)
    # Without the allowance, 0.1 epochs of 30 steps (3.0000000000000004) would be 4.
    return math.ceil(epochs * self.steps_per_epoch - 1e-9)

  def rows(self, start: int, stop: int) -> Paired:
    """Says which rows the steps start..stop-1 see.

    Args:
      start: first step, from 0.
      stop: the step after the last one.

    Returns:
      Paired [stop - start, B] int32 rows of the training split, -1 for padding; None for a role
      that no step reads.
    """
    return Paired(
        *(None if stream is None else stream.batches(start, stop) for stream in self.streams)
    )


def _shuffled(*sets: np.ndarray, seed: int) -> list[np.ndarray]:
  """Shuffles sets one after the other with one generator.

  Python's `random` and not NumPy's, because its order is the reference's; like NumPy's generators
  it is the same on every platform.
  """
  generator = random.Random(seed)
  result = []
  for rows in sets:
    rows = rows.tolist()
    generator.shuffle(rows)
    result.append(np.array(rows, np.int32))
  return result


def _check_fits(field: str, batch_size: int, **sets: np.ndarray) -> None:
  """Refuses a batch size that a set cannot fill even once."""
  for role, rows in sets.items():
    if not 1 <= batch_size <= len(rows):
      raise UserError(
          f"{field}={batch_size}: the {role} set has {len(rows)} rows, so choose 1..{len(rows)} or"
          " more data"
      )


def unlearning_plan(
    split: Paired,
    roles: str,
    *,
    batch_size: int,
    seed: int,
    repeats: int = 1,
    allow_oversized_batch: bool = False,
) -> BatchPlan:
  """Plans the batches of an unlearning method.

  `paired` methods read one batch of each role a step. `retain` (ft) goes over retain twice an epoch
  and `forget` (ga) over forget 2 max(1, n_retain // n_forget) times, so that they compute about as
  many gradients as a paired method; the copies are joined before they are cut into batches.

  Args:
    split: Paired rows.
    roles: one of `ROLES`.
    batch_size: rows of a role in a step.
    seed: of the shuffle.
    repeats: join that many copies of the data into one epoch, which has fewer short batches.
    allow_oversized_batch: pad a batch that is larger than its set, as the reference does, instead
      of refusing it.

  Returns:
    The plan.

  Raises:
    UserError: for unknown roles or a batch larger than a set that it reads.

  Source: github.com/aoi3142/HAMU, sequential gradient pairing.
  """
  if roles not in ROLES:
    raise UserError(f"roles={roles!r}: choose from {', '.join(ROLES)}")
  used = split._asdict() if roles == "paired" else {roles: getattr(split, roles)}
  if not allow_oversized_batch:
    _check_fits("config.method.batch_size", batch_size, **used)
  # The reference shuffles its training set, then the forget set; for ga the former is forget, too.
  first = split.forget if roles == "forget" else split.retain
  retain, forget = _shuffled(first, split.forget, seed=seed)
  if roles == "retain":
    streams = Paired(Stream(np.tile(retain, 2 * repeats), batch_size), None)
  elif roles == "forget":
    copies = 2 * max(1, len(split.retain) // len(split.forget))
    streams = Paired(None, Stream(np.tile(forget, copies * repeats), batch_size))
  else:
    streams = Paired(Stream(np.tile(retain, repeats), batch_size), Stream(forget, batch_size))
  return BatchPlan(batch_size, streams, repeats)


def training_plan(
    rows: np.ndarray, *, batch_size: int, seed: int, reshuffle: bool = True
) -> BatchPlan:
  """Plans the batches of plain training, as the retain role.

  Args:
    rows: [n] the rows to train on.
    batch_size: rows in a step.
    seed: of the shuffles.
    reshuffle: epoch e is ordered by `default_rng((seed, e))`; otherwise all epochs keep the one
      order that the reference shuffles once.

  Returns:
    The plan.

  Raises:
    UserError: for a batch larger than the set.
  """
  _check_fits("config.train.batch_size", batch_size, training=rows)
  if reshuffle:
    stream = Stream(np.asarray(rows, np.int32), batch_size, reshuffle_seed=seed)
  else:
    stream = Stream(_shuffled(rows, seed=seed)[0], batch_size)
  return BatchPlan(batch_size, Paired(stream, None))
