"""Plans the batches of each kind of method: which examples are read, in which order, how often.

The plans themselves, which give the examples of a step, are in `hamu_jax.data.batching`.
"""

import dataclasses
import random
import sys
from collections.abc import Sequence

import numpy as np

from hamu_jax.data.batching import BatchPlan, PassPlan, Stream
from hamu_jax.errors import UserError
from hamu_jax.paired import Paired

# The sets that a method's steps read.
ROLES = ("paired", "retain", "forget", "merged")
SHUFFLES = ("each_epoch", "once")
EPOCHS = ("matched", "pass")


def unlearning_plan(
  split: Paired,
  roles: str,
  *,
  batch_size: int | Sequence[int],
  seed: int,
  repeats: int = 1,
  shuffle: str = "once",
  epoch: str = "matched",
) -> BatchPlan:
  """Plans the batches of an unlearning method.

  `paired` methods read one batch of each role in each step. With `matched` epochs, `retain` (ft) goes over
  retain twice an epoch and `forget` (ga) goes over forget 2 max(1, n_retain // n_forget) times, so that they
  compute about as many gradients as a paired method. The copies are joined before they are cut into
  batches. With `pass` epochs, each goes over its own set once. `merged` is one pass over both sets.

  Args:
    split: Paired [n] indices of examples.
    roles: one of `ROLES`.
    batch_size: number of examples of a role in a step, or a pair (retain, forget). An epoch is a pass over
      retain in either case, and forget cycles.
    seed: seed of the shuffle.
    repeats: number of copies of the data in one epoch; more copies have fewer short batches.
    shuffle: one of `SHUFFLES`. With "each_epoch" forget starts over with every epoch and cycles over
      identical batches within it; with "once" it cycles on across epochs.
    epoch: one of `EPOCHS`.

  Returns:
    The plan.

  Raises:
    UserError: for an unknown choice, a batch size below 1, or an empty set that is read.

  Source: github.com/aoi3142/HAMU, sequential gradient pairing, for "once" and "matched";
  github.com/HaoranTang/sharp-unlearn for "each_epoch" and "pass".
  """
  _check_choices(roles=(roles, ROLES), shuffle=(shuffle, SHUFFLES), epoch=(epoch, EPOCHS))
  used = _sets_of(split, roles)
  sizes = role_sizes(batch_size)
  copies = _matched_copies(split, roles, sizes) if epoch == "matched" else 1
  if sizes.retain == sizes.forget:
    sizes = Paired(*[_fitting("config.method.batch_size", sizes.retain, copies * repeats, **used)] * 2)
  else:
    sizes = Paired(
      *(
        _fitting("config.method.batch_size", size, copies * repeats, **{role: used[role]})
        if role in used
        else size
        for role, size in sizes._asdict().items()
      )
    )
  # The reference shuffles its training set, then the forget set. For ga the training set is forget, too.
  retain, forget = _shuffled(used.get("retain", used.get("merged", split.forget)), split.forget, seed=seed)

  def stream(indices, size, key, copies=1, period=None):
    reshuffle = (seed, *key) if shuffle == "each_epoch" else None
    return Stream(np.tile(indices, copies * repeats), size, reshuffle, period if reshuffle else None)

  if roles == "forget":
    streams = Paired(None, stream(forget, sizes.forget, (1,), copies))
  elif roles == "paired":
    leading = stream(retain, sizes.retain, ())
    following = stream(forget, sizes.forget, (1,), period=leading.steps)
    # Forget is not repeated, because it cycles.
    streams = Paired(leading, dataclasses.replace(following, indices=forget))
  else:
    streams = Paired(stream(retain, sizes.retain, (), copies), None)
  return BatchPlan(max(each.batch_size for each in streams if each is not None), streams, repeats)


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
    split: Paired [n] indices of examples.
    order: the roles in the order of their passes in an epoch.
    active: for each role of `order`, how many of the first epochs have its pass; None for all epochs.
    batch_size: number of examples in a step.
    seed: seed of the shuffles.
    shuffle: "each_epoch" orders pass e of retain by `default_rng((seed, e))`, of forget by
      `default_rng((seed, 1, e))`; "once" keeps the first order.

  Returns:
    The plan.

  Raises:
    UserError: for a batch size below 1, or an empty set.

  Source: SCRUB (arXiv 2302.09880), which ascends on forget, then descends on retain.
  """
  batch_size = _fitting("config.method.batch_size", batch_size, **split._asdict())
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
    indices: [n] indices of the examples to train on.
    batch_size: number of examples in a step.
    seed: seed of the shuffles.
    reshuffle: whether epoch e is ordered by `default_rng((seed, e))`. Otherwise all epochs keep one
      order, shuffled once, as in the reference.

  Returns:
    The plan.

  Raises:
    UserError: for a batch size below 1, or an empty set.
  """
  batch_size = _fitting("config.train.batch_size", batch_size, training=indices)
  if reshuffle:
    stream = Stream(np.asarray(indices, np.int32), batch_size, reshuffle_seed=(seed,))
  else:
    stream = Stream(_shuffled(indices, seed=seed)[0], batch_size)
  return BatchPlan(batch_size, Paired(stream, None))


def _shuffled(*sets: np.ndarray, seed: int) -> list[np.ndarray]:
  """Shuffles sets one after the other with one generator.

  The generator is Python's `random` and not NumPy's, because the reference's order is that of `random`,
  which is the same on every platform, too.
  """
  generator = random.Random(seed)
  result = []
  for indices in sets:
    indices = indices.tolist()
    generator.shuffle(indices)
    result.append(np.array(indices, np.int32))
  return result


def role_sizes(batch_size: int | Sequence[int]) -> Paired:
  """The batch size of each role, of one number for both or of a pair."""
  return Paired(batch_size, batch_size) if isinstance(batch_size, int) else Paired(*batch_size)


def _matched_copies(split: Paired, roles: str, sizes: Paired) -> int:
  """Number of copies of a set with which an epoch has about as many steps as two of a paired method's."""
  if roles == "forget":
    return 2 * max(1, len(split.retain) * sizes.forget // (len(split.forget) * sizes.retain))
  return 2 if roles == "retain" else 1


def _check_choices(**fields: tuple[str, Sequence[str]]) -> None:
  """Refuses a value that is not one of its field's choices."""
  for field, (value, choices) in fields.items():
    if value not in choices:
      raise UserError(f"{field}={value!r}: choose from {', '.join(choices)}")


def _sets_of(split: Paired, roles: str) -> dict[str, np.ndarray]:
  """The sets from which batches of these roles are taken."""
  if roles == "paired":
    return split._asdict()
  if roles == "merged":
    return {roles: np.concatenate([split.forget, split.retain])}
  return {roles: getattr(split, roles)}


def _fitting(field: str, batch_size: int, copies: int = 1, **sets: np.ndarray) -> int:
  """The batch size, at most the largest set; a smaller set is padded, as in the reference.

  Args:
    field: name of the field, for messages.
    batch_size: number of examples of a role in a step.
    copies: number of copies of a set that are joined before they are cut into batches.
    **sets: [n] indices of the examples of each set.

  Raises:
    UserError: for a batch size below 1, or an empty set.
  """
  for role, indices in sets.items():
    if not len(indices):
      raise UserError(f"{field}={batch_size}: the {role} set has 0 examples; choose a larger set")
    if batch_size < 1:
      raise UserError(f"{field}={batch_size}: must be at least 1; give such a value")
    if batch_size > len(indices):
      print(
        f"note: {field}={batch_size}: the {role} set has {len(indices)} examples, so no batch holds more "
        "different ones",
        file=sys.stderr,
        flush=True,
      )
  return min(batch_size, copies * max(map(len, sets.values())))
