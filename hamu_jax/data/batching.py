"""Which examples each step sees: a pure function of the step number, so resuming needs no state.

Each set is cut into batches, the short last one kept; a pass over them follows the other. A pass over
retain is an epoch, hence retain restarts with each epoch.

HAMU's order: both sets are shuffled once and keep that order, and forget cycles on across epochs. The
sharpness paper's: each epoch shuffles anew, and forget cycles over identical batches within it.
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
    batch_size: B.
    reshuffle_seed: if not None, pass p is reordered by `default_rng((*reshuffle_seed, p))`.
    period: if not None, the stream starts over every so many steps, and p counts the starts.
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
    """Steps of one epoch: a pass over retain or, without retain, over forget."""
    return (self.streams.retain or self.streams.forget).steps

  def position(self, epochs: float) -> float:
    """Steps, also a fraction of one, until so many of this plan's epochs are over."""
    return epochs * self.steps_per_epoch

  def num_steps(self, epochs: float) -> int:
    """Steps of a run that goes over the data `epochs` times, a fraction of a step rounded up.

    With `repeats` it is as many of this plan's longer epochs as fit, but at least one.
    """
    if self.repeats > 1:
      epochs = max(1, epochs // self.repeats)
    return _round_up(self.position(epochs))

  def epochs(self, start: int, stop: int) -> np.ndarray:
    """The epoch of each of the steps start..stop-1, int32."""
    return (np.arange(start, stop) // self.steps_per_epoch).astype(np.int32)

  def indices(self, start: int, stop: int) -> Paired:
    """Says which examples the steps start..stop-1 see.

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
  """An epoch goes through the sets one after the other; the batch of the other role is all padding.

  Attributes:
    batch_size: B, examples of a role in a step, padding included.
    streams: Paired streams.
    order: the roles in the order of their passes.
    active: for each of `order`, the number of first epochs that have this pass; None for all.
  """

  batch_size: int
  streams: Paired
  order: tuple[str, ...]
  active: tuple[int | None, ...]

  @property
  def steps_per_epoch(self) -> int:
    """Steps of an epoch with all passes."""
    return sum(stream.steps for stream in self.streams)

  def _passes(self, epoch: int) -> list[str]:
    """The roles of an epoch's passes."""
    return [
      role for role, limit in zip(self.order, self.active, strict=True) if limit is None or epoch < limit
    ]

  def _length(self, epoch: int) -> int:
    return sum(getattr(self.streams, role).steps for role in self._passes(epoch))

  def position(self, epochs: float) -> float:
    """Steps, also a fraction of one, until so many epochs are over."""
    whole = int(epochs)
    return sum(map(self._length, range(whole))) + (epochs - whole) * self._length(whole)

  def num_steps(self, epochs: float) -> int:
    """Steps of a run of so many epochs, a fraction of a step rounded up."""
    return _round_up(self.position(epochs))

  def epochs(self, start: int, stop: int) -> np.ndarray:
    """The epoch of each of the steps start..stop-1, int32."""
    return np.array([epoch for epoch, _, _ in self._steps(start, stop)], np.int32)

  def indices(self, start: int, stop: int) -> Paired:
    """As `BatchPlan.indices`."""
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
  """The examples of models that are trained together, each on its own.

  Attributes:
    plans: one a model, with the same epochs and roles.
  """

  plans: tuple[BatchPlan | PassPlan, ...]

  @property
  def batch_size(self) -> int:
    """Examples of a role in a step, of all models."""
    return sum(plan.batch_size for plan in self.plans)

  def epochs(self, start: int, stop: int) -> np.ndarray:
    """As `BatchPlan.epochs`."""
    return self.plans[0].epochs(start, stop)

  def indices(self, start: int, stop: int) -> Paired:
    """As `BatchPlan.indices`, but [stop - start, models, B]."""
    own = [plan.indices(start, stop) for plan in self.plans]
    return Paired(
      *(None if roles[0] is None else np.stack(roles, axis=1) for roles in zip(*own, strict=True))
    )


def join_plans(
  plans: Sequence[BatchPlan | PassPlan],
) -> tuple[BatchPlan | PassPlan | JointPlan, bool]:
  """Returns one plan for all models, and whether each has examples of its own in it or all the same."""
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
  # Without the allowance, 0.1 epochs of 30 steps (3.0000000000000004) would be 4.
  return math.ceil(steps - 1e-9)
