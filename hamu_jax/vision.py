"""What makes an experiment one on images: how a batch is made, what the model is fed, what is evaluated."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hamu_jax import data as data_lib
from hamu_jax.evaluation import Examples
from hamu_jax.paired import Paired


def make_init(model, image_shape: Sequence[int]):
  """(seed) -> the variables of an untrained image model.

  Args:
    model: linen module.
    image_shape: (H, W, C).
  """

  def init(seed):
    variables = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

  return init


def make_features(model, mean, std):
  """(variables, images [B, H, W, C] uint8) -> the inputs [B, F] of the model's last layer.

  In evaluation mode; arguments as of `make_forward`.
  """

  def features(variables, images):
    dtype = jax.tree.leaves(variables["params"])[0].dtype
    images = data_lib.normalize(images, mean, std, dtype)
    _, recorded = model.apply(variables, images, train=False, mutable=["intermediates"])
    return recorded["intermediates"]["features"][0]

  return features


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
    # A model without batch norm updates nothing.
    return logits, updated.get("batch_stats", variables["batch_stats"])

  return forward


def make_fetch(augment: str):
  """(`source.ImageData`, rows [B], key) -> batch, gathered on the device and augmented."""

  def fetch(data, rows, key):
    batch = data_lib.take(data.images, data.labels, rows)
    present = rows.clip(0)
    # Keys go by the dataset's row, wherever a window has put it.
    batch |= {"row": data.ids[present], "forget": data.forget[present]}
    keys = data_lib.example_keys(key, batch["row"])
    return batch | {"image": data_lib.augment(batch["image"], keys, augment)}

  return fetch


def evaluation_splits(
    dataset: data_lib.Dataset,
    split: Paired,
    validation: np.ndarray,
    classes: Sequence[int] = (),
    levels: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Examples]:
  """Every set of examples that is evaluated.

  Args:
    dataset: training and test images.
    split: training rows by role.
    validation: training rows that no stage learns from; none if empty.
    classes: where the forget set is made of whole classes, these; the test set is then also shown in two
      parts, `test_forget` of the forgotten classes and `test_retain` of all others.
    levels: training rows by level of memorization, each evaluated under its name.
  """
  train, test = dataset.train, dataset.test

  def of_train(rows):
    return Examples(train.images, train.labels, rows)

  def of_test(rows):
    return Examples(test.images, test.labels, rows)

  splits = {
      "retain": of_train(split.retain),
      "forget": of_train(split.forget),
      "test": of_test(np.arange(len(test.labels))),
  }
  if len(validation):
    splits["validation"] = of_train(validation)
  if classes:
    forgotten = np.isin(test.labels, classes)
    if 0 < forgotten.sum() < forgotten.size:
      splits["test_retain"] = of_test(np.flatnonzero(~forgotten))
      splits["test_forget"] = of_test(np.flatnonzero(forgotten))
  return splits | {name: of_train(rows) for name, rows in (levels or {}).items()}
