"""What is differentiated: terms of predictions or examples, and their sum over a role's batch.

Shapes: B rows of a batch, S examples of a row, C classes; `...` the shape of a batch's labels: [B] for
images, each of which is one prediction, [B, P] for rows of P predicted tokens, of which a row may hold
several examples.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

Tree = Any
# Of RMU's direction, which is a constant of the method.
_DIRECTION_SEED = 0
Batch = Mapping[str, jax.Array]


class Outputs(NamedTuple):
  """What a model makes of a batch.

  Attributes:
    logits: [..., C].
    hidden: [..., D] states of a layer, where the model was asked for them.
  """

  logits: jax.Array
  hidden: jax.Array | None = None


class Inputs(NamedTuple):
  """What both roles of a step read.

  Attributes:
    base: variables that no method trains, beside those that are; {} where all are trained.
    reference: variables of the original model beside `base`, or None; read only if a term needs it.
    data: what `fetch` gathers from.
    key: key of the step.
    epoch_key: key of the epoch, for what is drawn once in it.
    hyperparameters: a method's hyperparameters by name.
  """

  base: Tree
  reference: Tree
  data: Tree
  key: jax.Array
  epoch_key: jax.Array
  hyperparameters: Mapping[str, Any]


class Context(NamedTuple):
  """What a term's values may depend on beside the model's outputs.

  Attributes:
    batch: the examples.
    reference: `Outputs` of the frozen original model, or None.
    params: the parameters that are differentiated.
    epoch_key: see `Inputs`.
    hyperparameters: see `Inputs`.
  """

  batch: Batch
  reference: Outputs | None
  params: Tree
  epoch_key: jax.Array
  hyperparameters: Mapping[str, Any]


class Term(NamedTuple):
  """One summand of an objective.

  Attributes:
    values: (Outputs, Context) -> values of the shape of the mask that it is averaged over.
    needs_reference: whether it reads the frozen original model's outputs.
    perturbed_only: whether a sharpness-aware objective has it at the perturbed point only.
    over: name of the batch's mask of what it is averaged over: "mask", the predictions; "example_mask",
      the examples; "alternative_mask", the predictions of alternative answers. The terms of a role that
      have weight at the same time have the same.
    needs_hidden: whether it reads the states of the layer `config.method.layer`.
    needs_alternative: whether it reads another answer to each prompt.
  """

  values: Callable[[Outputs, Context], jax.Array]
  needs_reference: bool = False
  perturbed_only: bool = False
  over: str = "mask"
  needs_hidden: bool = False
  needs_alternative: bool = False


class Sum(NamedTuple):
  """A sum and the number of its summands."""

  total: jax.Array
  # Hides the method of tuples.
  count: jax.Array  # type: ignore[assignment]


class RoleSums(NamedTuple):
  """Sums over what is valid in a role's batch.

  Attributes:
    gradient: gradient of the objective's sum, same structure as the parameters.
    values: `Sum` of each logged quantity.
    count: number of summands of the objective, by which its mean is taken.
    batch_stats: running statistics after the batch (unchanged in evaluation mode).
  """

  gradient: Tree
  values: dict[str, Sum]
  # Hides the method of tuples.
  count: jax.Array  # type: ignore[assignment]
  batch_stats: Tree


def cross_entropy(outputs, context):
  """`-log softmax(logits)[label]` of each prediction."""
  return -log_probability(outputs.logits, context.batch["label"])


def random_label_cross_entropy(outputs, context):
  """Cross-entropy in which what is to be forgotten has a random label.

  The label is uniform over all classes, so it may be the true one; each prediction draws it anew in each
  epoch, by its number in the dataset and whatever batch it lands in.
  """
  batch, logits = context.batch, outputs.logits

  def draw(index):
    key = jax.random.fold_in(context.epoch_key, index)
    return jax.random.randint(key, (), 0, logits.shape[-1], jnp.int32)

  drawn = jax.vmap(draw)(batch["index"].reshape(-1)).reshape(batch["index"].shape)
  return -log_probability(logits, jnp.where(batch["forget"], drawn, batch["label"]))


def kl_to_reference(outputs, context):
  """`sum_k p0_k (log p0_k - log p_k)` of each prediction; p0 is the frozen original model.

  Rounding can leave it just below zero; the reference implementation clamps it there, and so do we.
  """
  return jnp.maximum(_kl(context.reference.logits, outputs.logits), 0)


def distillation(outputs, context):
  """`T^2 KL(p0_T || p_T)` of each prediction, with logits divided by the temperature T.

  Source: SCRUB (arXiv 2302.09880); `hyperparameters["temperature"]` is T.
  """
  temperature = jnp.asarray(context.hyperparameters["temperature"], outputs.logits.dtype)
  divided = (context.reference.logits / temperature, outputs.logits / temperature)
  return temperature**2 * _kl(*divided)


def l1_norm(outputs, context):
  """`sum |w|` over all parameters, as the same value for each prediction: its mean is the norm."""
  norm = sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(context.params))
  return jnp.broadcast_to(norm.astype(outputs.logits.dtype), context.batch["label"].shape)


def npo(outputs, context):
  """`-(2/b) log sigmoid(-b (log p - log p0))` of each example, log p summed over its answer.

  Negative preference optimisation: ascent whose weight fades as the answer gets less likely than it was
  in the original model. Source: arXiv 2404.05868, equation 3; b is `hyperparameters["preference_beta"]`, 0.1.
  """
  beta = _beta(context, 0.1)
  ratio = _sequence_log_ratio(outputs, context, "mask")
  return -2 / beta * jax.nn.log_sigmoid(-beta * ratio)


def simnpo(outputs, context):
  """`-(2/b) log sigmoid(b (nll / length - d))` of each example: NPO without the original model.

  Source: arXiv 2410.07163, equation 4; b is `hyperparameters["preference_beta"]`, 4.5, and the margin d
  `hyperparameters["margin"]`.
  """
  beta = _beta(context, 4.5)
  log_probs = log_probability(outputs.logits, context.batch["label"])
  length = jnp.maximum(_per_example(jnp.ones_like(log_probs), context, "mask"), 1)
  loss = -_per_example(log_probs, context, "mask") / length
  return -2 / beta * jax.nn.log_sigmoid(beta * (loss - context.hyperparameters["margin"]))


def dpo(outputs, context):
  """`-(2/b) log sigmoid(b (win - lose))` of each example, with the log ratios to the original model.

  Direct preference optimisation: the alternative answer, "I don't know", wins over the example's own.
  Source: arXiv 2305.18290 as TOFU (arXiv 2401.06121) uses it; b is `hyperparameters["preference_beta"]`, 0.1.
  """
  beta = _beta(context, 0.1)
  win = _sequence_log_ratio(outputs, context, "alternative_mask")
  lose = _sequence_log_ratio(outputs, context, "mask")
  return -2 / beta * jax.nn.log_sigmoid(beta * (win - lose))


def misdirection(outputs, context):
  """`|h - c u|^2 / D` of each prediction, h the states [D] of a layer and u a fixed random unit vector.

  Source: RMU (arXiv 2403.03218), equation 1; c is `hyperparameters["steering"]`.
  """
  hidden = _exact(outputs.hidden)
  direction = jax.random.uniform(jax.random.key(_DIRECTION_SEED), hidden.shape[-1:], hidden.dtype)
  direction = direction / jnp.linalg.norm(direction)
  target = (context.hyperparameters["steering"] * direction).astype(hidden.dtype)
  target = target.reshape((1,) * (hidden.ndim - 1) + target.shape)
  return jnp.mean(jnp.square(hidden - target), axis=-1)


def hidden_distance(outputs, context):
  """`|h - h0|^2 / D` of each prediction: how far a layer's states are from the original model's.

  Source: RMU (arXiv 2403.03218), equation 2.
  """
  hidden, reference = _exact(outputs.hidden), _exact(context.reference.hidden)
  return jnp.mean(jnp.square(hidden - reference), axis=-1)


def _exact(hidden):
  """States of a model that computes in 16 bits in 32, as the logits are."""
  return hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))


def undial(outputs, context):
  """Cross-entropy to the original model's distribution with the true token's logit lowered by b.

  Source: UNDIAL (arXiv 2402.10052), equation 3; b is `hyperparameters["preference_beta"]`, 10.
  """
  reference = context.reference.logits
  lowered = jax.nn.one_hot(context.batch["label"], reference.shape[-1], dtype=reference.dtype)
  target = jax.nn.softmax(reference - _beta(context, 10.0) * lowered)
  return -jnp.sum(target * jax.nn.log_softmax(outputs.logits), axis=-1)


def weighted_cross_entropy(outputs, context):
  """`p^b CE` of each prediction, p its probability, through which no gradient flows.

  Ascended, it leaves alone what is forgotten already. Source: WGA (arXiv 2502.19301), equation 9; b is
  `hyperparameters["preference_beta"]`, 1.
  """
  log_probs = log_probability(outputs.logits, context.batch["label"])
  weight = jnp.exp(_beta(context, 1.0) * log_probs)
  return -jax.lax.stop_gradient(weight) * log_probs


def _beta(context, default: float):
  """The method's own value where `config.method.preference_beta` is not set."""
  beta = context.hyperparameters["preference_beta"]
  return default if beta is None else beta


def _per_example(values, context, over: str):
  """Sums of predictions' values over each example: [B, S] of [B, P], with the weights of a mask."""
  batch = context.batch
  slots = jnp.arange(batch["example_mask"].shape[1])
  belongs = batch["slot"][:, :, None] == slots[None, None]
  weights = batch[over].astype(values.dtype)
  return jnp.einsum("bp,bps->bs", values * weights, belongs.astype(values.dtype))


def _sequence_log_ratio(outputs, context, over: str):
  """`log p - log p0` of each example's answer: [B, S]."""
  label = context.batch["label"]
  ratio = log_probability(outputs.logits, label) - log_probability(context.reference.logits, label)
  return _per_example(ratio, context, over)


def log_probability(logits, label):
  """`log softmax(logits)[label]`: [...] of [..., C] and [...]."""
  log_probs = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(log_probs, label[..., None], axis=-1)[..., 0]


def _kl(first, second):
  """KL divergence of the second from the first softmax: [...] of [..., C]."""
  log_p0, log_p = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
  return jnp.sum(jnp.exp(log_p0) * (log_p0 - log_p), axis=-1)


TERMS: dict[str, Term] = {
  "ce": Term(cross_entropy),
  "kl": Term(kl_to_reference, needs_reference=True),
  "distillation": Term(distillation, needs_reference=True),
  "random_label": Term(random_label_cross_entropy),
  "l1": Term(l1_norm, perturbed_only=True),
  "alternative": Term(cross_entropy, over="alternative_mask", needs_alternative=True),
  "npo": Term(npo, needs_reference=True, over="example_mask"),
  "simnpo": Term(simnpo, over="example_mask"),
  "dpo": Term(dpo, needs_reference=True, over="example_mask", needs_alternative=True),
  "misdirection": Term(misdirection, needs_hidden=True),
  "hidden": Term(hidden_distance, needs_reference=True, needs_hidden=True),
  "undial": Term(undial, needs_reference=True),
  "weighted_ce": Term(weighted_cross_entropy),
}


def clean_coefficients(coefficients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The coefficients at the unperturbed point of a sharpness-aware objective."""
  return {
    name: jnp.zeros_like(value) if TERMS[name].perturbed_only else value
    for name, value in coefficients.items()
  }


def role_gradient(
  forward,
  fetch,
  terms: tuple[str, ...],
  *,
  train: bool,
  microbatch: int = 0,
  together: tuple[str, ...] = (),
):
  """Builds the function that differentiates one role's objective on one batch.

  The objective is `sum_t coefficient_t sum_i mask_i term_t(i)`, i over predictions or examples. Being a
  sum, it adds up over microbatches and devices; whoever holds all of them divides by the count.

  Args:
    forward: (variables, batch, key, train) -> (Outputs, batch_stats).
    fetch: (data, indices [B], key) -> batch with `label` and `mask`, [B, ...] each; index -1 is padding.
    terms: names in `TERMS`; no other term is computed.
    train: whether the model is in training mode.
    microbatch: most rows differentiated at a time; 0 takes the batch whole, which a model with batch
      statistics needs in training mode. Pieces after the last valid row are skipped.
    together: mesh axes whose devices must go through as many pieces each, because `forward` exchanges
      something over them.

  Returns:
    (variables, Inputs, indices [B], coefficients {term: scalar}) -> RoleSums.
  """
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
    return RoleSums(gradient, values, count, batch_stats)

  def accumulated(variables, inputs, index_B, coefficients):
    if train and variables["batch_stats"]:
      raise ValueError(f"microbatch={microbatch}: batch statistics need all of a batch")
    # Equal pieces, not full ones and a rest: the least padding.
    pieces = -(-index_B.shape[0] // microbatch)
    size = -(-index_B.shape[0] // pieces)
    index_B = jnp.pad(index_B, (0, pieces * size - index_B.shape[0]), constant_values=-1)
    index_NxM = index_B.reshape(pieces, size)
    is_used_N = jnp.any(index_NxM >= 0, axis=1)
    used = jnp.max(jnp.where(is_used_N, jnp.arange(1, pieces + 1), 0))
    if together:
      used = jax.lax.pmax(used, together)

    def piece(index_M):
      return whole(variables, inputs, index_M, coefficients)._replace(batch_stats=())

    def add(index, total):
      return jax.tree.map(jnp.add, total, piece(index_NxM[index]))

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(piece, index_NxM[0]))
    total = jax.lax.fori_loop(0, used, add, zeros)
    return total._replace(batch_stats=variables["batch_stats"])

  return accumulated if microbatch else whole


def _count(values: Mapping[str, Sum], terms: tuple[str, ...], coefficients) -> jax.Array:
  """The number of summands of the terms that have weight.

  Under `vmap` and `pmap` a role is given the other's terms too, with coefficient 0.
  """
  first, *others = terms
  count = values[first].count
  for name in others:
    if TERMS[name].over != TERMS[first].over:
      count = jnp.where(coefficients[name] != 0, values[name].count, count)
  return count
