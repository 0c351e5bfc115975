"""Per-example evaluation of a model on named splits."""

from collections.abc import Mapping

import jax
import numpy as np

from hamu_jax.metrics import classification, membership


class Evaluator:
  """Evaluates a model, in evaluation mode, on every split; one compilation for all of them.

  Args:
    forward: (variables, batch, key, train) -> (logits [B, C], batch_stats).
    splits: name -> (images [N, H, W, C] uint8, labels [N] int32).
    batch_size: examples a device program; rounded up to a multiple of the devices.
    mesh: devices that share each batch, or None for the default device.
  """

  def __init__(self, forward, splits: Mapping[str, tuple[np.ndarray, np.ndarray]], batch_size: int,
               mesh: jax.sharding.Mesh | None = None):
    self.splits = splits
    devices = mesh.devices.size if mesh else 1
    self._batch_size = -(-batch_size // devices) * devices
    self._sharding = None
    out_shardings = None
    if mesh:
      self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
      out_shardings = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def evaluate_batch(variables, batch):
      # Evaluation draws no random numbers; the key is there because `forward` takes one.
      logits_BxC, _ = forward(variables, batch, jax.random.key(0), False)
      return classification.per_example(logits_BxC, batch["label"])

    self._evaluate_batch = jax.jit(evaluate_batch, out_shardings=out_shardings)

  def _batch(self, images, labels, start):
    """Rows [start, start + batch size), padded with copies of row 0."""
    rows = np.arange(start, start + self._batch_size)
    valid = rows < len(labels)
    rows = np.where(valid, rows, 0)
    batch = {"image": images[rows], "label": labels[rows], "mask": valid, "row": rows.astype(np.int32)}
    if self._sharding is None:
      return batch
    return {name: jax.device_put(leaf, self._sharding) for name, leaf in batch.items()}

  def per_example(self, variables) -> dict[str, dict[str, np.ndarray]]:
    """Loss, correctness and entropy of every example: {split: {quantity: [N]}}."""
    results = {}
    for name, (images, labels) in self.splits.items():
      pieces = [
          self._evaluate_batch(variables, self._batch(images, labels, start))
          for start in range(0, len(labels), self._batch_size)
      ]
      results[name] = {
          quantity: np.concatenate([np.asarray(piece[quantity]) for piece in pieces])[: len(labels)]
          for quantity in pieces[0]
      }
    return results

  def summary(self, variables) -> dict[str, dict[str, float] | float]:
    """Means of every split, and the areas under the loss ROC curves.

    Returns:
      {split: {"accuracy", "loss", "entropy", "count"}, "retain_forget_auc", "forget_test_auc"}; each AUC
      is the probability that a random example of the second set has the higher loss.
    """
    examples = self.per_example(variables)
    result = {name: classification.summarize(values) for name, values in examples.items()}
    for first, second in (("retain", "forget"), ("forget", "test")):
      result[f"{first}_{second}_auc"] = membership.loss_auc(
          examples[first]["loss"], examples[second]["loss"]
      )
    return result


def selection_score(summary) -> float:
  """Mean of retain and forget accuracy, by which training keeps its best evaluated epoch."""
  return (summary["retain"]["accuracy"] + summary["forget"]["accuracy"]) / 2
