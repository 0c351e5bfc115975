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


class Inputs(NamedTuple):
  """What both roles of a step read.

  Attributes:
    reference: variables of the frozen original model, or None; read only if a term needs it.
    data: what `fetch` gathers from.
    key: key of the step.
    epoch_key: key of the epoch, for what is drawn once in it.
    settings: a method's settings by name.
  """

  reference: Tree
  data: Tree
  key: jax.Array
  epoch_key: jax.Array
  settings: Mapping[str, Any]


class Context(NamedTuple):
  """What a term's values may depend on beside the logits.

  Attributes:
    batch: the examples.
    reference_logits: [B, C] of the frozen original model, or None.
    params: the parameters that are differentiated.
    epoch_key: see `Inputs`.
    settings: see `Inputs`.
  """

  batch: Batch
  reference_logits: jax.Array | None
  params: Tree
  epoch_key: jax.Array
  settings: Mapping[str, Any]


class Term(NamedTuple):
  """One summand of an objective.

  Attributes:
    values: (logits [B, C], Context) -> [B], one value an example.
    needs_reference: whether it reads the frozen original model's logits.
    perturbed_only: whether a sharpness-aware objective has it at the perturbed point only.
  """

  values: Callable[[jax.Array, Context], jax.Array]
  needs_reference: bool = False
  perturbed_only: bool = False


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


def cross_entropy(logits_BxC, context):
  """`-log softmax(logits)[label]` of each example, [B]."""
  return _cross_entropy(logits_BxC, context.batch["label"])


def random_label_cross_entropy(logits_BxC, context):
  """Cross-entropy in which the examples to be forgotten have a random label, [B].

  The label is uniform over all classes, so it may be the true one; each example draws it anew in each
  epoch, by its row in the dataset and whatever batch it lands in.
  """
  batch, classes = context.batch, logits_BxC.shape[1]

  def draw(row):
    return jax.random.randint(jax.random.fold_in(context.epoch_key, row), (), 0, classes, jnp.int32)

  label_B = jnp.where(batch["forget"], jax.vmap(draw)(batch["row"]), batch["label"])
  return _cross_entropy(logits_BxC, label_B)


def kl_to_reference(logits_BxC, context):
  """`sum_k p0_k (log p0_k - log p_k)` of each example, [B]; p0 is the frozen original model.

  Rounding can leave it just below zero; the reference implementation clamps it there, and so do we.
  """
  return jnp.maximum(_kl(context.reference_logits, logits_BxC), 0)


def distillation(logits_BxC, context):
  """`T^2 KL(p0_T || p_T)` of each example, [B], with logits divided by the temperature T.

  Source: SCRUB (arXiv 2302.09880); `settings["temperature"]` is T.
  """
  temperature = jnp.asarray(context.settings["temperature"], logits_BxC.dtype)
  return temperature**2 * _kl(context.reference_logits / temperature, logits_BxC / temperature)


def l1_norm(logits_BxC, context):
  """`sum |w|` over all parameters, as the same value for each example, [B]: its mean is the norm."""
  norm = sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(context.params))
  return jnp.broadcast_to(norm.astype(logits_BxC.dtype), logits_BxC.shape[:1])


def _cross_entropy(logits_BxC, label_B):
  log_probs_BxC = jax.nn.log_softmax(logits_BxC)
  return -jnp.take_along_axis(log_probs_BxC, label_B[:, None], axis=1)[:, 0]


def _kl(first_BxC, second_BxC):
  """KL divergence of the second from the first softmax, [B]."""
  log_p0_BxC, log_p_BxC = jax.nn.log_softmax(first_BxC), jax.nn.log_softmax(second_BxC)
  return jnp.sum(jnp.exp(log_p0_BxC) * (log_p0_BxC - log_p_BxC), axis=1)


TERMS: dict[str, Term] = {
    "ce": Term(cross_entropy),
    "kl": Term(kl_to_reference, needs_reference=True),
    "distillation": Term(distillation, needs_reference=True),
    "random_label": Term(random_label_cross_entropy),
    "l1": Term(l1_norm, perturbed_only=True),
}


def clean_coefficients(coefficients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The coefficients at the unperturbed point of a sharpness-aware objective."""
  return {
      name: jnp.zeros_like(value) if TERMS[name].perturbed_only else value
      for name, value in coefficients.items()
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
    (variables, Inputs, rows [B], coefficients {term: scalar}) -> RoleSums.
  """
  if train and microbatch:
    raise ValueError(f"microbatch={microbatch} with batch statistics: the statistics need all rows")
  needs_reference = any(TERMS[name].needs_reference for name in terms)

  def whole(variables, inputs, rows_B, coefficients):
    chex.assert_rank(rows_B, 1)
    batch = fetch(inputs.data, rows_B, inputs.key)
    chex.assert_shape([batch["label"], batch["mask"]], rows_B.shape)
    reference_logits_BxC = None
    if needs_reference:
      reference_logits_BxC, _ = forward(inputs.reference, batch, inputs.key, False)
      reference_logits_BxC = jax.lax.stop_gradient(reference_logits_BxC)

    def objective(params):
      logits_BxC, batch_stats = forward({**variables, "params": params}, batch, inputs.key, train)
      chex.assert_shape(logits_BxC, (rows_B.shape[0], None))
      context = Context(batch, reference_logits_BxC, params, inputs.epoch_key, inputs.settings)
      mask_B = batch["mask"].astype(logits_BxC.dtype)
      total = jnp.zeros([], logits_BxC.dtype)
      values = {}
      for name in terms:
        summed = jnp.sum(mask_B * TERMS[name].values(logits_BxC, context))
        total += coefficients[name].astype(total.dtype) * summed
        values[name] = summed
      correct_B = jnp.argmax(logits_BxC, axis=1) == batch["label"]
      if "ce" not in values:
        values["ce"] = jnp.sum(mask_B * cross_entropy(jax.lax.stop_gradient(logits_BxC), context))
      values["accuracy"] = jnp.sum(mask_B * correct_B)
      return total, (values, jnp.sum(mask_B), batch_stats)

    gradient, (values, count, batch_stats) = jax.grad(objective, has_aux=True)(variables["params"])
    return RoleSums(gradient, values, count, batch_stats)

  def accumulated(variables, inputs, rows_B, coefficients):
    # Equal pieces, not full ones and a rest: the least padding.
    pieces = -(-rows_B.shape[0] // microbatch)
    size = -(-rows_B.shape[0] // pieces)
    rows_B = jnp.pad(rows_B, (0, pieces * size - rows_B.shape[0]), constant_values=-1)
    rows_NxM = rows_B.reshape(pieces, size)

    def piece(rows_M):
      return whole(variables, inputs, rows_M, coefficients)._replace(batch_stats=())

    def add(total, rows_M):
      return jax.tree.map(jnp.add, total, piece(rows_M)), None

    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(piece, rows_NxM[0])
    )
    total, _ = jax.lax.scan(add, zeros, rows_NxM)
    return total._replace(batch_stats=variables["batch_stats"])

  return accumulated if microbatch else whole
