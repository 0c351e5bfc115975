"""What is differentiated: per-example terms and their sum over a role's batch.

Shapes: B examples, C classes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

Tree = Any
Batch = Mapping[str, jax.Array]


class Term(NamedTuple):
  """One summand of an objective.

  Attributes:
    values: (logits [B, C], batch, reference logits [B, C] or None) -> [B], one value an example.
    needs_reference: whether it reads the frozen original model's logits.
  """

  values: Callable[[jax.Array, Batch, jax.Array | None], jax.Array]
  needs_reference: bool


class RoleSums(NamedTuple):
  """Sums over the valid examples of a role's batch.

  Attributes:
    gradient: gradient of the objective's sum, same structure as the parameters.
    values: sums of the logged quantities.
    count: number of valid examples.
    batch_stats: running statistics after the batch (unchanged in evaluation mode).
  """

  gradient: Tree
  values: dict[str, jax.Array]
  count: jax.Array
  batch_stats: Tree


def cross_entropy(logits_BxC, batch, reference_logits_BxC=None):
  """`-log softmax(logits)[label]` of each example, [B]."""
  del reference_logits_BxC
  log_probs_BxC = jax.nn.log_softmax(logits_BxC)
  return -jnp.take_along_axis(log_probs_BxC, batch["label"][:, None], axis=1)[:, 0]


def kl_to_reference(logits_BxC, batch, reference_logits_BxC):
  """`sum_k p0_k (log p0_k - log p_k)` of each example, [B]; p0 is the frozen original model.

  Rounding can leave it just below zero; the reference implementation clamps it there, and so do we.
  """
  del batch
  log_p0_BxC = jax.nn.log_softmax(reference_logits_BxC)
  log_p_BxC = jax.nn.log_softmax(logits_BxC)
  return jnp.maximum(jnp.sum(jnp.exp(log_p0_BxC) * (log_p0_BxC - log_p_BxC), axis=1), 0)


TERMS: dict[str, Term] = {
    "ce": Term(cross_entropy, needs_reference=False),
    "kl": Term(kl_to_reference, needs_reference=True),
}


def role_gradient(forward, fetch, terms: tuple[str, ...], *, train: bool, microbatch: int = 0):
  """Builds the function that differentiates one role's objective on one batch.

  The objective is `sum_i mask_i sum_t coefficient_t term_t(example i)`. Being a sum, it adds up over
  microbatches and devices; whoever holds all of them divides by the count.

  Args:
    forward: (variables, batch, key, train) -> (logits [B, C], batch_stats).
    fetch: (data, rows [B], key) -> batch with `label` and `mask`, [B] each; row -1 is padding.
    terms: names in `TERMS`; no other term is computed.
    train: whether batch norm uses batch statistics. A microbatch would change those, so it must be 0.
    microbatch: most examples differentiated at a time; 0 takes the batch whole.

  Returns:
    (variables, reference, data, rows [B], coefficients {term: scalar}, key) -> RoleSums. `reference`
    holds the variables of the frozen original model, and is read only if a term needs it.
  """
  if train and microbatch:
    raise ValueError(f"microbatch={microbatch} with batch statistics: the statistics need all rows")
  needs_reference = any(TERMS[name].needs_reference for name in terms)

  def whole(variables, reference, data, rows_B, coefficients, key):
    chex.assert_rank(rows_B, 1)
    batch = fetch(data, rows_B, key)
    chex.assert_shape([batch["label"], batch["mask"]], rows_B.shape)
    reference_logits_BxC = None
    if needs_reference:
      reference_logits_BxC, _ = forward(reference, batch, key, False)
      reference_logits_BxC = jax.lax.stop_gradient(reference_logits_BxC)

    def objective(params):
      logits_BxC, batch_stats = forward({**variables, "params": params}, batch, key, train)
      chex.assert_shape(logits_BxC, (rows_B.shape[0], None))
      mask_B = batch["mask"].astype(logits_BxC.dtype)
      total = jnp.zeros([], logits_BxC.dtype)
      values = {}
      for name in terms:
        summed = jnp.sum(mask_B * TERMS[name].values(logits_BxC, batch, reference_logits_BxC))
        total += coefficients[name] * summed
        values[name] = summed
      correct_B = jnp.argmax(logits_BxC, axis=1) == batch["label"]
      if "ce" not in values:
        values["ce"] = jnp.sum(mask_B * cross_entropy(jax.lax.stop_gradient(logits_BxC), batch))
      values["accuracy"] = jnp.sum(mask_B * correct_B)
      return total, (values, jnp.sum(mask_B), batch_stats)

    gradient, (values, count, batch_stats) = jax.grad(objective, has_aux=True)(variables["params"])
    return RoleSums(gradient, values, count, batch_stats)

  def accumulated(variables, reference, data, rows_B, coefficients, key):
    # Equal pieces, not full ones and a rest: the least padding.
    pieces = -(-rows_B.shape[0] // microbatch)
    size = -(-rows_B.shape[0] // pieces)
    rows_B = jnp.pad(rows_B, (0, pieces * size - rows_B.shape[0]), constant_values=-1)
    rows_NxM = rows_B.reshape(pieces, size)

    def piece(rows_M):
      return whole(variables, reference, data, rows_M, coefficients, key)._replace(batch_stats=())

    def add(total, rows_M):
      return jax.tree.map(jnp.add, total, piece(rows_M)), None

    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(piece, rows_NxM[0])
    )
    total, _ = jax.lax.scan(add, zeros, rows_NxM)
    return total._replace(batch_stats=variables["batch_stats"])

  return accumulated if microbatch else whole
