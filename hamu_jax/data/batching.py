"""Which examples each step sees: a pure function of the step number, so resuming needs no state.

Each set is cut into batches, the short last one kept; a pass over them follows the other. A pass over
retain is an epoch, hence retain restarts with each epoch.

HAMU's order: both sets are shuffled once and keep that order, and forget cycles on across epochs. The
sharpness paper's: each epoch shuffles anew, and forget cycles over identical batches within it.
"""

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from hamu_jax.errors import UserError
from hamu_jax.paired import Paired

PADDING = -1
# Which sets a method's steps read.
ROLES = ("paired", "retain", "forget", "merged")
SHUFFLES = ("each_epoch", "once")
EPOCHS = ("matched", "pass")


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


def _shuffled(*sets: np.ndarray, seed: int) -> list[np.ndarray]:
  """Shuffles sets one after the other with one generator.

  Python's `random` and not NumPy's, because its order is the reference's; like NumPy's generators
  it is the same on every platform.
  """
  generator = random.Random(seed)
  result = []
  for indices in sets:
    indices = indices.tolist()
    generator.shuffle(indices)
    result.append(np.array(indices, np.int32))
  return result


def _check_fits(field: str, batch_size: int, **sets: np.ndarray) -> None:
  """Refuses a batch size that a set cannot fill even once."""
  for role, indices in sets.items():
    if not 1 <= batch_size <= len(indices):
      raise UserError(
        f"{field}={batch_size}: the {role} set has {len(indices)} examples, so choose"
        f" 1..{len(indices)} or more data"
      )


def unlearning_plan(
  split: Paired,
  roles: str,
  *,
  batch_size: int,
  seed: int,
  repeats: int = 1,
  shuffle: str = "once",
  epoch: str = "matched",
  allow_oversized_batch: bool = False,
) -> BatchPlan:
  """Plans the batches of an unlearning method.

  `paired` methods read one batch of each role a step. With `matched` epochs `retain` (ft) goes over
  retain twice an epoch and `forget` (ga) over forget 2 max(1, n_retain // n_forget) times, so that they
  compute about as many gradients as a paired method; the copies are joined before they are cut into
  batches. With `pass` epochs each goes over its own set once. `merged` is one pass over both sets.

  Args:
    split: Paired examples.
    roles: one of `ROLES`.
    batch_size: examples of a role in a step.
    seed: of the shuffle.
    repeats: join that many copies of the data into one epoch, which has fewer short batches.
    shuffle: one of `SHUFFLES`. With "each_epoch" forget starts over with every epoch and cycles over
      identical batches within it; with "once" it cycles on across epochs.
    epoch: one of `EPOCHS`.
    allow_oversized_batch: pad a batch that is larger than its set, as the reference does, instead
      of refusing it.

  Returns:
    The plan.

  Raises:
    UserError: for unknown roles or a batch larger than a set that it reads.

  Source: github.com/aoi3142/HAMU, sequential gradient pairing, for "once" and "matched";
  github.com/HaoranTang/sharp-unlearn for "each_epoch" and "pass".
  """
  for field, value, choices in (
    ("roles", roles, ROLES),
    ("shuffle", shuffle, SHUFFLES),
    ("epoch", epoch, EPOCHS),
  ):
    if value not in choices:
      raise UserError(f"{field}={value!r}: choose from {', '.join(choices)}")
  used: dict[str, Any] = {roles: getattr(split, roles, None)}
  if roles == "paired":
    used = split._asdict()
  elif roles == "merged":
    used = {roles: np.concatenate([split.forget, split.retain])}
  if not allow_oversized_batch:
    _check_fits("config.method.batch_size", batch_size, **used)
  # The reference shuffles its training set, then the forget set; for ga the former is forget, too.
  first = used.get("retain", used.get("merged", split.forget))
  retain, forget = _shuffled(first, split.forget, seed=seed)

  def stream(indices, key, copies=1, period=None):
    reshuffle = (seed, *key) if shuffle == "each_epoch" else None
    return Stream(np.tile(indices, copies * repeats), batch_size, reshuffle, period if reshuffle else None)

  matched = epoch == "matched"
  if roles == "forget":
    copies = 2 * max(1, len(split.retain) // len(split.forget)) if matched else 1
    streams = Paired(None, stream(forget, (1,), copies))
  elif roles == "paired":
    leading = stream(retain, ())
    # Forget is not repeated: it cycles.
    cycling = dataclasses.replace(stream(forget, (1,), period=leading.steps), indices=forget)
    streams = Paired(leading, cycling)
  else:
    copies = 2 if matched and roles == "retain" else 1
    streams = Paired(stream(retain, (), copies), None)
  return BatchPlan(batch_size, streams, repeats)


def pass_plan(
  split: Paired,
  order: Sequence[str],
  active: Sequence[int | None],
  *,
  batch_size: int,
  seed: int,
  shuffle: str = "each_epoch",
) -> PassPlan:
  """Plans the batches of a method that goes through the sets one after the other.

  Args:
    split: Paired examples.
    order: the roles in the order of their passes in an epoch.
    active: for each of them, the number of first epochs that have this pass; None for all.
    batch_size: examples in a step.
    seed: of the shuffles.
    shuffle: "each_epoch" orders pass e of retain by `default_rng((seed, e))`, of forget by
      `default_rng((seed, 1, e))`; "once" keeps the first order.

  Raises:
    UserError: for a batch larger than a set.

  Source: SCRUB (arXiv 2302.09880), which ascends on forget, then descends on retain.
  """
  _check_fits("config.method.batch_size", batch_size, **split._asdict())
  if shuffle == "once":
    indices, seeds = Paired(*_shuffled(*split, seed=seed)), Paired(None, None)
  else:
    indices, seeds = split, Paired((seed,), (seed, 1))
  streams = Paired(
    *(Stream(np.asarray(role, np.int32), batch_size, key) for role, key in zip(indices, seeds, strict=True))
  )
  return PassPlan(batch_size, streams, tuple(order), tuple(active))


def training_plan(indices: np.ndarray, *, batch_size: int, seed: int, reshuffle: bool = True) -> BatchPlan:
  """Plans the batches of plain training, as the retain role.

  Args:
    indices: [n] the examples to train on.
    batch_size: examples in a step.
    seed: of the shuffles.
    reshuffle: epoch e is ordered by `default_rng((seed, e))`; otherwise all epochs keep the one
      order that the reference shuffles once.

  Returns:
    The plan.

  Raises:
    UserError: for a batch larger than the set.
  """
  _check_fits("config.train.batch_size", batch_size, training=indices)
  if reshuffle:
    stream = Stream(np.asarray(indices, np.int32), batch_size, reshuffle_seed=(seed,))
  else:
    stream = Stream(_shuffled(indices, seed=seed)[0], batch_size)
  return BatchPlan(batch_size, Paired(stream, None))
