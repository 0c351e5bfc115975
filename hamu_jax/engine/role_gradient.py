"""The gradient of one role's objective on one batch, the function that every pairing applies."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from hamu_jax.engine.objectives import TERMS, Context, cross_entropy

Tree = Any


class Inputs(NamedTuple):
  """What both roles of a step read.

  Attributes:
    base: variables that no method trains; {} if all variables are trained.
    reference: trained variables of the original model, or None; read only if a term needs them.
    data: arrays that `fetch` gathers from.
    key: random key of the step.
    epoch_key: random key of the epoch, for random numbers that are drawn once an epoch.
    hyperparameters: hyperparameters of the method by name.
  """

  base: Tree
  reference: Tree
  data: Tree
  key: jax.Array
  epoch_key: jax.Array
  hyperparameters: Mapping[str, Any]


class Sum(NamedTuple):
  """A sum and the number of its summands."""

  total: jax.Array
  # Hides the method of tuples.
  count: jax.Array  # type: ignore[assignment]


class RunningStatistics(NamedTuple):
  """Running statistics that two roles move from the same start.

  Attributes:
    updated: the statistics after a batch.
    retained: share of the start that is in them, 1 minus the momentum of the model's layer; same structure.
  """

  updated: Tree
  retained: Tree


class RoleSums(NamedTuple):
  """Sums over the valid predictions or examples of a role's batch.

  Attributes:
    gradient: gradient of the objective's sum, same structure as the parameters.
    values: `Sum` of each logged quantity.
    count: number of summands of the objective.
    batch_stats: running statistics after the batch (unchanged in evaluation mode); `RunningStatistics` if
      two roles are to be merged.
  """

  gradient: Tree
  values: dict[str, Sum]
  # Hides the method of tuples.
  count: jax.Array  # type: ignore[assignment]
  batch_stats: Tree


def role_gradient(
  forward,
  fetch,
  terms: tuple[str, ...],
  *,
  train: bool,
  microbatch: int = 0,
  exchange_axes: tuple[str, ...] = (),
  merges: bool = False,
):
  """Builds the function that differentiates one role's objective on one batch.

  The objective is `sum_t coefficient_t sum_i mask_i term_t(i)`, with i over predictions or examples. Sums add
  up over microbatches and devices; the caller divides the total by the count.

  Args:
    forward: (variables, batch, key, train) -> (Outputs, batch_stats).
    fetch: (data, indices [B], key) -> batch with `label` and `mask`, [B, ...] each. Index -1 is padding.
    terms: names in `TERMS`; no other term is computed.
    train: whether the model is in training mode.
    microbatch: largest number of indices differentiated at a time; 0 takes the whole batch, which a model
      with batch statistics needs in training mode. Pieces after the last valid index are skipped.
    exchange_axes: mesh axes over which `forward` exchanges something, so that all their devices must compute
      the same number of pieces.
    merges: whether the running statistics of this role and of another one are merged in training mode.

  Returns:
    (variables, Inputs, indices [B], coefficients {term: scalar}) -> RoleSums.
  """
  whole = _on_whole_batch(forward, fetch, terms, train=train, merges=merges)
  if not microbatch:
    return whole
  return _on_pieces(whole, train=train, microbatch=microbatch, exchange_axes=exchange_axes)


def _on_whole_batch(forward, fetch, terms: tuple[str, ...], *, train: bool, merges: bool):
  """`role_gradient` without microbatches."""
  needs_reference = any(TERMS[name].needs_reference for name in terms)

  def whole(variables, inputs, index_B, coefficients):
    chex.assert_rank(index_B, 1)
    batch = fetch(inputs.data, index_B, inputs.key)
    label, mask = batch["label"], batch["mask"]
    chex.assert_equal_shape([label, mask])
    chex.assert_equal_shape_prefix([label, index_B], 1)
    reference = None
    if needs_reference:
      reference, _ = forward({**inputs.base, **inputs.reference}, batch, inputs.key, False)
      reference = jax.lax.stop_gradient(reference)

    def objective(params):
      outputs, batch_stats = forward({**inputs.base, **variables, "params": params}, batch, inputs.key, train)
      chex.assert_shape(outputs.logits, (*label.shape, None))
      dtype = outputs.logits.dtype
      context = Context(batch, reference, params, inputs.epoch_key, inputs.hyperparameters)

      def summed(values, over="mask"):
        weights = batch[over].astype(dtype)
        return Sum(jnp.sum(weights * values), jnp.sum(weights))

      total = jnp.zeros([], dtype)
      values = {}
      for name in terms:
        values[name] = summed(TERMS[name].values(outputs, context), TERMS[name].over)
        total += coefficients[name].astype(dtype) * values[name].total
      count = _count(values, terms, coefficients)
      if "ce" not in values:
        values["ce"] = summed(cross_entropy(jax.lax.stop_gradient(outputs), context))
      values["accuracy"] = summed(jnp.argmax(outputs.logits, axis=-1) == label)
      return total, (values, count, batch_stats)

    gradient, (values, count, batch_stats) = jax.grad(objective, has_aux=True)(variables["params"])
    if merges and batch_stats:
      batch_stats = RunningStatistics(batch_stats, _retained_share(forward, variables, inputs, batch))
    return RoleSums(gradient, values, count, batch_stats)

  return whole


def _retained_share(forward, variables, inputs: Inputs, batch) -> Tree:
  """How much of the running statistics a batch in training mode leaves: their derivative by themselves.

  A layer updates s to (1 - m) s + m b with its own momentum m, so the derivative in the direction of ones is
  1 - m, whatever the batch. The compiler drops the forward pass, of which nothing else is used.
  """

  def updated(batch_stats):
    moved = {**inputs.base, **variables, "batch_stats": batch_stats}
    return forward(moved, batch, inputs.key, True)[1]

  start = variables["batch_stats"]
  return jax.jvp(updated, (start,), (jax.tree.map(jnp.ones_like, start),))[1]


def _on_pieces(whole, *, train: bool, microbatch: int, exchange_axes: tuple[str, ...]):
  """The sums of `whole` over pieces of a batch."""

  def accumulated(variables, inputs, index_B, coefficients):
    if train and variables["batch_stats"]:
      raise ValueError(f"microbatch={microbatch}: batch statistics need all of a batch")
    # Pieces of equal size have the least padding.
    pieces = -(-index_B.shape[0] // microbatch)
    size = -(-index_B.shape[0] // pieces)
    index_B = jnp.pad(index_B, (0, pieces * size - index_B.shape[0]), constant_values=-1)
    index_NxM = index_B.reshape(pieces, size)
    is_used_N = jnp.any(index_NxM >= 0, axis=1)
    used = jnp.max(jnp.where(is_used_N, jnp.arange(1, pieces + 1), 0))
    if exchange_axes:
      used = jax.lax.pmax(used, exchange_axes)

    def piece(index_M):
      return whole(variables, inputs, index_M, coefficients)._replace(batch_stats=())

    def add(index, total):
      return jax.tree.map(jnp.add, total, piece(index_NxM[index]))

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(piece, index_NxM[0]))
    total = jax.lax.fori_loop(0, used, add, zeros)
    return total._replace(batch_stats=variables["batch_stats"])

  return accumulated


def _count(values: Mapping[str, Sum], terms: tuple[str, ...], coefficients) -> jax.Array:
  """The number of summands of the terms whose coefficient is not 0.

  Under `vmap` and `pmap` a role also has the terms of the other role, with coefficient 0.
  """
  first, *others = terms
  count = values[first].count
  for name in others:
    if TERMS[name].over != TERMS[first].over:
      count = jnp.where(coefficients[name] != 0, values[name].count, count)
  return count
