"""What makes an experiment one on images: how a batch is made, what the model is fed, what is evaluated."""

import jax
import numpy as np

from hamu_jax import data as data_lib
from hamu_jax.paired import Paired


def make_forward(model, mean, std, axis_name: str | None):
  """(variables, batch, key, train) -> (logits [B, C], batch_stats) of an image model.

  Args:
    model: linen module.
    mean: of each channel, in [0, 1].
    std: of each channel.
    axis_name: mesh axis over which training-mode batch norm shares its statistics.
  """

  def forward(variables, batch, key, train):
    del key  # These models draw no random numbers.
    dtype = jax.tree.leaves(variables["params"])[0].dtype
    images = data_lib.normalize(batch["image"], mean, std, dtype)
    if not train:
      return model.apply(variables, images, train=False), variables["batch_stats"]
    logits, updated = model.apply(
        variables, images, train=True, mask=batch["mask"], axis_name=axis_name,
        mutable=["batch_stats"],
    )
    return logits, updated["batch_stats"]

  return forward


def make_fetch(augment: str):
  """(data, rows [B], key) -> batch, gathered on the device and augmented."""

  def fetch(data, rows, key):
    batch = data_lib.take(*data, rows)
    keys = data_lib.example_keys(key, batch["row"])
    return batch | {"image": data_lib.augment(batch["image"], keys, augment)}

  return fetch


def evaluation_splits(dataset: data_lib.Dataset, split: Paired, classes) -> dict[str, tuple]:
  """Images and labels of every split that is evaluated.

  Where the forget set is made of whole classes the test set is also shown in two parts: `test_forget`,
  the forgotten classes, and `test_retain`, all others.
  """
  train, test = dataset.train, dataset.test
  splits = {
      "retain": (train.images[split.retain], train.labels[split.retain]),
      "forget": (train.images[split.forget], train.labels[split.forget]),
      "test": (test.images, test.labels),
  }
  if classes:
    forgotten = np.isin(test.labels, classes)
    if 0 < forgotten.sum() < forgotten.size:
      splits["test_retain"] = (test.images[~forgotten], test.labels[~forgotten])
      splits["test_forget"] = (test.images[forgotten], test.labels[forgotten])
  return splits
