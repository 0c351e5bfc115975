"""Per-example classification metrics and their means.

Axis legend: B examples of a batch, C classes, N examples of a split.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics

from hamu_jax.errors import UserError

_Means = clu_metrics.Collection.create(
  accuracy=clu_metrics.Average.from_output("correct"),
  loss=clu_metrics.Average.from_output("loss"),
  entropy=clu_metrics.Average.from_output("entropy"),
)


def per_example(logits_BxC: jax.Array, labels_B: jax.Array) -> dict[str, jax.Array]:
  r"""Loss, correctness and predictive entropy of each example.

  With :math:`\log p = \operatorname{log\,softmax}(z)` and label :math:`y`:

  .. math::
    \text{loss} = -\log p_y, \quad \text{correct} = [\arg\max_k z_k = y], \quad
    \text{entropy} = -\sum_k p_k \log p_k \;\text{(nats)}

  A class with :math:`p_k = 0` contributes nothing to the entropy, although its log is infinite.

  Args:
    logits_BxC: Unnormalised scores.
    labels_B: Integer classes in [0, C).

  Returns:
    ``{"loss", "correct", "entropy"}``, each [B] in the dtype of the logits (correct is 0 or 1).
  """
  log_probs_BxC = jax.nn.log_softmax(logits_BxC)
  probs_BxC = jnp.exp(log_probs_BxC)
  terms_BxC = probs_BxC * jnp.where(probs_BxC > 0, log_probs_BxC, 0)
  loss_B = -jnp.take_along_axis(log_probs_BxC, labels_B[:, None], axis=-1)[:, 0]
  correct_B = jnp.argmax(logits_BxC, axis=-1) == labels_B
  return {
    "loss": loss_B,
    "correct": correct_B.astype(logits_BxC.dtype),
    "entropy": -jnp.sum(terms_BxC, axis=-1),
  }


def summarize(examples: Mapping[str, np.ndarray], mask: np.ndarray | None = None) -> dict[str, float]:
  """Means over the examples of one split, aggregated by ``clu.metrics``.

  Every example has the same weight, however the split was cut into batches. The reference averages
  accuracy and entropy over the *batch means*. There, the examples of a short last batch weigh more, and the
  result depends on the evaluation batch size. Its losses are averaged over examples.

  Args:
    examples: ``{"loss", "correct", "entropy"}``, each [N], the results of `per_example`.
    mask: [N], zero for padding; None counts every example.

  Returns:
    ``{"accuracy", "loss", "entropy", "count"}`` as Python numbers; accuracy in [0, 1].

  Raises:
    UserError: if no example is left to average.
  """
  if mask is None:
    mask = np.ones(len(examples["loss"]), bool)
  means = _Means.single_from_model_output(**examples, mask=jnp.asarray(mask))
  count = int(means.loss.count)
  if not count:
    raise UserError("a split without a single example has no accuracy; choose sets that are not empty")
  return {name: float(mean) for name, mean in means.compute().items()} | {"count": count}
