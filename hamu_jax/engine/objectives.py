"""The terms of objectives: values of predictions or examples that are summed over a role's batch.

Shapes: B rows of a batch, S examples of a row, C classes, D features. `...` is the shape of a batch's labels:
[B] for images, each of which is one prediction; [B, P] for packed rows of P predicted tokens, which may hold
several examples.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any
# Seed of RMU's direction, which is a constant of the method.
_DIRECTION_SEED = 0
Batch = Mapping[str, jax.Array]


class Outputs(NamedTuple):
  """The outputs of a model for a batch.

  Attributes:
    logits: [..., C] logits.
    hidden: [..., D] states of a layer; None unless the model was asked for them.
  """

  logits: jax.Array
  hidden: jax.Array | None = None


class Context(NamedTuple):
  """What the values of a term may depend on besides the model's outputs.

  Attributes:
    batch: examples.
    reference: `Outputs` of the frozen original model, or None.
    params: parameters that are differentiated.
    epoch_key: see `role_gradient.Inputs`.
    hyperparameters: see `role_gradient.Inputs`.
  """

  batch: Batch
  reference: Outputs | None
  params: Tree
  epoch_key: jax.Array
  hyperparameters: Mapping[str, Any]


class Term(NamedTuple):
  """One summand of an objective.

  Attributes:
    values: (Outputs, Context) -> values, of the same shape as the mask `over`.
    needs_reference: whether it reads the outputs of the frozen original model.
    perturbed_only: whether a sharpness-aware objective has it at the perturbed point only.
    over: name of the mask that it is averaged over: "mask" for predictions, "example_mask" for examples,
      "alternative_mask" for predictions of alternative answers. Terms of a role that have weight at the same
      time must have the same mask.
    needs_hidden: whether it reads the states of layer `config.method.layer`.
    needs_alternative: whether it reads an alternative answer to each prompt.
    reads: names of the fields of `config.method` that it reads, including `layer`, which the model reads.
  """

  values: Callable[[Outputs, Context], jax.Array]
  needs_reference: bool = False
  perturbed_only: bool = False
  over: str = "mask"
  needs_hidden: bool = False
  needs_alternative: bool = False
  reads: tuple[str, ...] = ()


def cross_entropy(outputs, context):
  """`-log softmax(logits)[label]` of each prediction."""
  return -log_probability(outputs.logits, context.batch["label"])


def random_label_cross_entropy(outputs, context):
  """Cross-entropy of each prediction, with a random label for what is to be forgotten.

  The label is uniform over all classes, so it may be the true one. Each prediction draws it anew in each
  epoch, from its index in the dataset and independently of its batch.
  """
  batch, logits = context.batch, outputs.logits

  def draw(index):
    key = jax.random.fold_in(context.epoch_key, index)
    return jax.random.randint(key, (), 0, logits.shape[-1], jnp.int32)

  drawn = jax.vmap(draw)(batch["index"].reshape(-1)).reshape(batch["index"].shape)
  return -log_probability(logits, jnp.where(batch["forget"], drawn, batch["label"]))


def kl_to_reference(outputs, context):
  """`sum_k p0_k (log p0_k - log p_k)` of each prediction; p0 is the frozen original model.

  Rounding can make it slightly negative. It is then set to 0, as in the reference implementation.
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
  """`sum |w|` over all parameters: the same value for each prediction, so that its mean is the norm."""
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

  Direct preference optimisation: the alternative answer, such as "I don't know", wins over the true one.
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
  """Hidden states in at least 32 bits, as the logits are."""
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

  Ascent then has little effect on what is forgotten already. Source: WGA (arXiv 2502.19301), equation 9; b is
  `hyperparameters["preference_beta"]`, 1.
  """
  log_probs = log_probability(outputs.logits, context.batch["label"])
  weight = jnp.exp(_beta(context, 1.0) * log_probs)
  return -jax.lax.stop_gradient(weight) * log_probs


def _beta(context, default: float):
  """The coefficient b: `config.method.preference_beta`, or the method's default if it is not set."""
  beta = context.hyperparameters["preference_beta"]
  return default if beta is None else beta


def _per_example(values, context, over: str):
  """Masked sums of the predictions' values over each example: [B, S] from [B, P]."""
  batch = context.batch
  slots = jnp.arange(batch["example_mask"].shape[1])
  belongs = batch["slot"][:, :, None] == slots[None, None]
  weights = batch[over].astype(values.dtype)
  return jnp.einsum("bp,bps->bs", values * weights, belongs.astype(values.dtype))


def _sequence_log_ratio(outputs, context, over: str):
  """`log p - log p0` of the answer of each example: [B, S]."""
  label = context.batch["label"]
  ratio = log_probability(outputs.logits, label) - log_probability(context.reference.logits, label)
  return _per_example(ratio, context, over)


def log_probability(logits, label):
  """`log softmax(logits)[label]`: [...] from logits [..., C] and labels [...]."""
  log_probs = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(log_probs, label[..., None], axis=-1)[..., 0]


def _kl(first, second):
  """`KL(softmax(first) || softmax(second))`: [...] from logits [..., C]."""
  log_p0, log_p = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
  return jnp.sum(jnp.exp(log_p0) * (log_p0 - log_p), axis=-1)


TERMS: dict[str, Term] = {
  "ce": Term(cross_entropy),
  "kl": Term(kl_to_reference, needs_reference=True),
  "distillation": Term(distillation, needs_reference=True, reads=("temperature",)),
  "random_label": Term(random_label_cross_entropy),
  "l1": Term(l1_norm, perturbed_only=True),
  "alternative": Term(cross_entropy, over="alternative_mask", needs_alternative=True),
  "npo": Term(npo, needs_reference=True, over="example_mask", reads=("preference_beta",)),
  "simnpo": Term(simnpo, over="example_mask", reads=("preference_beta", "margin")),
  "dpo": Term(
    dpo, needs_reference=True, over="example_mask", needs_alternative=True, reads=("preference_beta",)
  ),
  "misdirection": Term(misdirection, needs_hidden=True, reads=("steering", "layer")),
  "hidden": Term(hidden_distance, needs_reference=True, needs_hidden=True, reads=("layer",)),
  "undial": Term(undial, needs_reference=True, reads=("preference_beta",)),
  "weighted_ce": Term(weighted_cross_entropy, reads=("preference_beta",)),
}


def clean_coefficients(coefficients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The coefficients at the unperturbed point of a sharpness-aware objective."""
  return {
    name: jnp.zeros_like(value) if TERMS[name].perturbed_only else value
    for name, value in coefficients.items()
  }
