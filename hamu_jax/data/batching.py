"""Which examples each step reads: a pure function of the step number, so resuming needs no state.

Each set is cut into batches; the last batch of a pass may be short. Passes over a set follow one
another. An epoch is one pass over retain, so retain restarts with each epoch.

In HAMU's order, both sets are shuffled once and keep that order, and forget cycles on across epochs. In
the sharpness paper's order, each epoch shuffles anew, and forget cycles over identical batches within it.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from hamu_jax.paired import Paired

PADDING = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
  """Endless passes over some examples.

  Attributes:
    indices: [n] the examples of a pass, in order.
    batch_size: B, examples of a batch.
    reshuffle_seed: if not None, pass p is reordered by `default_rng((*reshuffle_seed, p))`.
    period: number of steps after which the stream starts over; p then counts these starts. None is the
      length of a pass.
  """

  indices: np.ndarray
  batch_size: int
  reshuffle_seed: tuple[int, ...] | None = None
  period: int | None = None

  @property
  def steps(self) -> int:
    """Batches in a pass."""
    return -(-len(self.indices) // self.batch_size)

  def pass_batches(self, number: int) -> np.ndarray:
    """Returns all batches of one pass, [steps, B] int32, -1 = padding."""
    indices = self.indices
    if self.reshuffle_seed is not None:
      indices = np.random.default_rng((*self.reshuffle_seed, number)).permutation(indices)
    batches = np.full(self.steps * self.batch_size, PADDING, np.int32)
    batches[: len(indices)] = indices
    return batches.reshape(self.steps, self.batch_size)

  def batches(self, start: int, stop: int) -> np.ndarray:
    """Returns the examples of steps start..stop-1, [stop - start, B] int32, -1 = padding."""
    out = np.empty((stop - start, self.batch_size), np.int32)
    period = self.period or self.steps
    for number in range(start // period, -(-stop // period)):
      first = number * period
      steps = np.arange(max(start, first), min(stop, first + period))
      out[steps - start] = self.pass_batches(number)[(steps - first) % self.steps]
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class BatchPlan:
  """The examples of every step of a run.

  Attributes:
    batch_size: B, examples of a role in a step, padding included.
    streams: Paired streams, None for a role that no step reads.
    repeats: how many times an epoch of this plan goes over the data.
  """

  batch_size: int
  streams: Paired
  repeats: int = 1

  @property
  def steps_per_epoch(self) -> int:
    """Number of steps of one epoch: a pass over retain or, without retain, over forget."""
    return (self.streams.retain or self.streams.forget).steps

  def position(self, epochs: float) -> float:
    """Number of steps, not rounded, that `epochs` of this plan's epochs take."""
    return epochs * self.steps_per_epoch

  def num_steps(self, epochs: float) -> int:
    """Number of steps, rounded up, of a run that goes over the data `epochs` times.

    With `repeats`, the run has as many of this plan's longer epochs as fit, but at least one.
    """
    if self.repeats > 1:
      epochs = max(1, epochs // self.repeats)
    return _round_up(self.position(epochs))

  def epochs(self, start: int, stop: int) -> np.ndarray:
    """The epoch of each of the steps start..stop-1, int32."""
    return (np.arange(start, stop) // self.steps_per_epoch).astype(np.int32)

  def indices(self, start: int, stop: int) -> Paired:
    """Returns the examples that the steps start..stop-1 read.

    Args:
      start: first step, from 0.
      stop: the step after the last one.

    Returns:
      Paired [stop - start, B] int32 examples of the training split, -1 for padding; None for a role
      that no step reads.
    """
    return Paired(*(None if stream is None else stream.batches(start, stop) for stream in self.streams))


@dataclasses.dataclass(frozen=True, eq=False)
class PassPlan:
  """Epochs that go through the sets one after the other; the batch of the other role is all padding.

  Attributes:
    batch_size: B, examples of a role in a step, padding included.
    streams: Paired streams.
    order: the roles in the order of their passes.
    active: for each role of `order`, how many of the first epochs have its pass; None for all epochs.
  """

  batch_size: int
  streams: Paired
  order: tuple[str, ...]
  active: tuple[int | None, ...]

  @property
  def steps_per_epoch(self) -> int:
    """Number of steps of an epoch with all passes."""
    return sum(stream.steps for stream in self.streams)

  def _passes(self, epoch: int) -> list[str]:
    """The roles of an epoch's passes."""
    return [
      role for role, limit in zip(self.order, self.active, strict=True) if limit is None or epoch < limit
    ]

  def _length(self, epoch: int) -> int:
    return sum(getattr(self.streams, role).steps for role in self._passes(epoch))

  def position(self, epochs: float) -> float:
    """Number of steps, not rounded, that the first `epochs` epochs take."""
    whole = int(epochs)
    return sum(map(self._length, range(whole))) + (epochs - whole) * self._length(whole)

  def num_steps(self, epochs: float) -> int:
    """Number of steps, rounded up, of a run of `epochs` epochs."""
    return _round_up(self.position(epochs))

  def epochs(self, start: int, stop: int) -> np.ndarray:
    """The epoch of each of the steps start..stop-1, int32."""
    return np.array([epoch for epoch, _, _ in self._steps(start, stop)], np.int32)

  def indices(self, start: int, stop: int) -> Paired:
    """See `BatchPlan.indices`."""
    out = Paired(*(np.full((stop - start, self.batch_size), PADDING, np.int32) for _ in self.streams))
    passes = {}
    for step, (epoch, role, index) in enumerate(self._steps(start, stop)):
      if (epoch, role) not in passes:
        passes[epoch, role] = getattr(self.streams, role).pass_batches(epoch)
      getattr(out, role)[step] = passes[epoch, role][index]
    return out

  def _steps(self, start: int, stop: int) -> list[tuple[int, str, int]]:
    """(epoch, role, index of the batch in its pass) of the steps start..stop-1."""
    steps, epoch, position = [], 0, 0
    while position < stop:
      for role in self._passes(epoch):
        count = getattr(self.streams, role).steps
        first, last = max(start - position, 0), min(stop - position, count)
        steps += [(epoch, role, index) for index in range(first, last)]
        position += count
      epoch += 1
    return steps


@dataclasses.dataclass(frozen=True, eq=False)
class JointPlan:
  """The examples of several models that are trained in one program, each on examples of its own.

  Attributes:
    plans: one plan for each model; all have the same epochs and roles.
  """

  plans: tuple[BatchPlan | PassPlan, ...]

  @property
  def batch_size(self) -> int:
    """Examples of a role in a step, summed over the models."""
    return sum(plan.batch_size for plan in self.plans)

  def epochs(self, start: int, stop: int) -> np.ndarray:
    """See `BatchPlan.epochs`."""
    return self.plans[0].epochs(start, stop)

  def indices(self, start: int, stop: int) -> Paired:
    """See `BatchPlan.indices`; the arrays are [stop - start, models, B]."""
    own = [plan.indices(start, stop) for plan in self.plans]
    return Paired(
      *(None if roles[0] is None else np.stack(roles, axis=1) for roles in zip(*own, strict=True))
    )


def join_plans(
  plans: Sequence[BatchPlan | PassPlan],
) -> tuple[BatchPlan | PassPlan | JointPlan, bool]:
  """Returns one plan for all models, and whether each model has its own examples in it."""
  if all(_equal(plan, plans[0]) for plan in plans[1:]):
    return plans[0], False
  return JointPlan(tuple(plans)), True


def _equal(one, other) -> bool:
  """Whether plans, streams or their fields are the same."""
  if dataclasses.is_dataclass(one):
    fields = [field.name for field in dataclasses.fields(one)]
    return type(one) is type(other) and all(
      _equal(getattr(one, name), getattr(other, name)) for name in fields
    )
  if isinstance(one, Paired):
    return all(map(_equal, one, other))
  return np.array_equal(one, other)


def _round_up(steps: float) -> int:
  # Without the tolerance, 0.1 epochs of 30 steps (3.0000000000000004) would be 4 steps.
  return math.ceil(steps - 1e-9)
