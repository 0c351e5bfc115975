"""Evaluates an image model on every example of named splits."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from hamu_jax.metrics import classification, membership
from hamu_jax.run import compilation


class Examples(NamedTuple):
  """Some examples of a labelled image split.

  Attributes:
    images: [N, H, W, C] uint8 images of the split, or an object that returns them when indexed.
    labels: [N] int32 labels of the split.
    indices: [n] indices of the examples in the split.
  """

  images: Any
  labels: np.ndarray
  indices: np.ndarray


class Evaluator:
  """Evaluates a model, in evaluation mode, on every split; one compilation for all of them.

  Args:
    forward: (variables, batch, key, train) -> (Outputs with logits [B, C], batch_stats).
    splits: examples by name of the split.
    batch_size: number of examples in a batch, rounded up to a multiple of the number of devices.
    mesh: devices that share each batch, or None for the default device.
  """

  def __init__(
    self, forward, splits: Mapping[str, Examples], batch_size: int, mesh: jax.sharding.Mesh | None = None
  ):
    self.splits = splits
    devices = mesh.devices.size if mesh else 1
    # A batch that is larger than every split would only be padded.
    batch_size = min(batch_size, max(len(examples.indices) for examples in splits.values()))
    self._batch_size = max(-(-batch_size // devices), 1) * devices
    self._sharding = None
    out_shardings = None
    if mesh:
      self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
      out_shardings = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def logits(variables, batch):
      # Evaluation draws no random numbers, but `forward` takes a key.
      return forward(variables, batch, jax.random.key(0), False)[0].logits

    def evaluate_batch(variables, batch):
      return classification.per_example(logits(variables, batch), batch["label"])

    def probabilities(variables, batch):
      return jax.nn.softmax(logits(variables, batch))

    self._evaluate_batch = compilation.jit(evaluate_batch, out_shardings=out_shardings)
    self._probabilities = compilation.jit(probabilities, out_shardings=out_shardings)
    # Evaluates the members of an ensemble, each on the whole batch.
    self._evaluate_members = compilation.jit(jax.vmap(evaluate_batch, in_axes=(0, None)))

  def _batch(self, examples: Examples, start: int):
    """The batch of the examples start..start + batch size - 1, padded with copies of the first."""
    index = np.arange(start, start + self._batch_size)
    valid = index < len(examples.indices)
    indices = examples.indices[np.where(valid, index, 0)]
    leaves = {
      "image": lambda part: examples.images[indices[part]],
      "label": lambda part: examples.labels[indices[part]],
      "mask": lambda part: valid[part],
      "index": lambda part: indices[part].astype(np.int32),
    }
    if self._sharding is None:
      return {name: leaf(slice(None)) for name, leaf in leaves.items()}
    shapes = {"image": examples.images.shape[1:]}

    def placed(name, leaf):
      # A callback, so that a host reads only the images of its own devices.
      return jax.make_array_from_callback(
        (self._batch_size, *shapes.get(name, ())), self._sharding, lambda index: leaf(index[0])
      )

    return {name: placed(name, leaf) for name, leaf in leaves.items()}

  def _over(self, examples: Examples, function, axis: int = 0):
    """The concatenated values of `function`, (batch) -> pytree, over all batches of a split."""
    count = len(examples.indices)
    pieces = [
      jax.device_get(function(self._batch(examples, start))) for start in range(0, count, self._batch_size)
    ]

    def join(*leaves):
      return np.take(np.concatenate(leaves, axis), np.arange(count), axis)

    return jax.tree.map(join, *pieces)

  def per_example(self, variables, *, members: bool = False) -> dict[str, dict[str, np.ndarray]]:
    """Evaluates every example.

    Args:
      variables: variables of the model; with `members` each leaf has a leading axis of models.
      members: whether the variables are those of several models.

    Returns:
      {split: {"loss", "correct", "entropy": [n]}}, with `members` [models, n].
    """
    evaluate, axis = (self._evaluate_members, 1) if members else (self._evaluate_batch, 0)
    return {
      name: self._over(examples, lambda batch: evaluate(variables, batch), axis)
      for name, examples in self.splits.items()
    }

  def summary(self, variables) -> dict[str, Any]:
    """Means of every split, and the areas under the ROC curves of the loss.

    Returns:
      {split: {"accuracy", "loss", "entropy", "count"}, "retain_forget_auc", "forget_test_auc"}; each AUC
      is the probability that a random example of the second set has the higher loss.
    """
    examples = self.per_example(variables)
    result: dict[str, Any] = {name: classification.summarize(values) for name, values in examples.items()}
    for first, second in (("retain", "forget"), ("forget", "test")):
      result[f"{first}_{second}_auc"] = membership.loss_auc(examples[first]["loss"], examples[second]["loss"])
    return result

  def membership(self, variables, attack: Callable[..., Any], most: int, seed: int) -> dict[str, float]:
    """The shares of the forget set that attacks call non-members.

    Args:
      variables: variables of the model.
      attack: `metrics.membership.svc_mia` or `metrics.threshold_mia.threshold_mia`.
      most: largest number of retain examples, and of as many test examples, that the attacks learn from.
      seed: seed of the draw of these examples.
    """
    known, unknown = self.splits["retain"], self.splits["test"]
    size = min(most, len(known.indices), len(unknown.indices))
    rng = np.random.default_rng(seed)
    drawn = [
      split._replace(indices=np.sort(rng.permutation(split.indices)[:size])) for split in (known, unknown)
    ]
    sets = []
    for split in (*drawn, self.splits["forget"]):
      probs = self._over(split, lambda batch: self._probabilities(variables, batch))
      sets += [probs, split.labels[split.indices]]
    return attack(*sets)


def selection_score(summary) -> float:
  """The accuracy by which training keeps its best evaluated model.

  It is that of the validation split if there is one, else the mean of retain and forget.
  """
  if "validation" in summary:
    return summary["validation"]["accuracy"]
  return (summary["retain"]["accuracy"] + summary["forget"]["accuracy"]) / 2
