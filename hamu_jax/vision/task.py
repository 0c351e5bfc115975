"""The task of an experiment on images: batches, the forward pass, evaluated splits and files."""

import copy
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from hamu_jax import data as data_lib
from hamu_jax import models
from hamu_jax.config import default as config_lib
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine.objectives import Outputs
from hamu_jax.metrics import membership, threshold_mia
from hamu_jax.models import weights
from hamu_jax.paired import Paired
from hamu_jax.run import rundir
from hamu_jax.vision import evaluation
from hamu_jax.vision import feed as feed_lib
from hamu_jax.vision import request as request_lib
from hamu_jax.vision.evaluation import Examples


def make_init(model, image_shape: Sequence[int]):
  """Makes (seed) -> the variables of an untrained image model.

  Args:
    model: linen module.
    image_shape: shape (H, W, C) of an image.
  """

  def init(seed):
    variables = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

  return init


def make_features(model, mean, std):
  """Makes (variables, images [B, H, W, C] uint8) -> the inputs [B, F] of the model's last layer.

  The model is in evaluation mode. See `make_forward` for the arguments.
  """

  def features(variables, images):
    dtype = jax.tree.leaves(variables["params"])[0].dtype
    images = data_lib.normalize(images, mean, std, dtype)
    _, recorded = model.apply(variables, images, train=False, mutable=["intermediates"])
    return recorded["intermediates"]["features"][0]

  return features


def make_forward(model, mean, std, axis_name: str | None):
  """Makes (variables, batch, key, train) -> (Outputs with logits [B, C], batch_stats).

  Args:
    model: linen module.
    mean: mean of each channel, in [0, 1].
    std: standard deviation of each channel.
    axis_name: mesh axis over which training-mode batch norm shares its statistics.
  """

  def forward(variables, batch, key, train):
    del key  # These models draw no random numbers.
    dtype = jax.tree.leaves(variables["params"])[0].dtype
    images = data_lib.normalize(batch["image"], mean, std, dtype)
    if not train:
      return Outputs(model.apply(variables, images, train=False)), variables["batch_stats"]
    logits, updated = model.apply(
      variables,
      images,
      train=True,
      mask=batch["mask"],
      axis_name=axis_name,
      mutable=["batch_stats"],
    )
    # A model without batch norm updates nothing.
    return Outputs(logits), updated.get("batch_stats", variables["batch_stats"])

  return forward


def make_fetch(augment: str):
  """Makes (`feed.ImageData`, indices [B], key) -> batch, gathered on the device and augmented."""

  def fetch(data, indices, key):
    batch = data_lib.take(data.images, data.labels, indices)
    present = indices.clip(0)
    # Keys depend on the index in the dataset, not on the place in a window.
    batch |= {"index": data.ids[present], "forget": data.forget[present]}
    keys = data_lib.example_keys(key, batch["index"])
    return batch | {"image": data_lib.augment(batch["image"], keys, augment)}

  return fetch


def evaluation_splits(
  dataset: data_lib.Dataset,
  split: Paired,
  validation: np.ndarray,
  classes: Sequence[int] = (),
  levels: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Examples]:
  """The splits to evaluate, by name.

  Args:
    dataset: training and test images.
    split: Paired indices of training examples.
    validation: indices of training examples that no stage learns from; may be empty.
    classes: classes to forget, if the forget set consists of whole classes. The test set is then also split
      into `test_forget`, with examples of these classes, and `test_retain`, with all others.
    levels: indices of training examples by level of memorization, which becomes the name of a split.
  """
  train, test = dataset.train, dataset.test

  def of_train(indices):
    return Examples(train.images, train.labels, indices)

  def of_test(indices):
    return Examples(test.images, test.labels, indices)

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
  return splits | {name: of_train(indices) for name, indices in (levels or {}).items()}


class Vision:
  """An experiment on images; an `experiment.task.Task`.

  Attributes:
    request: examples that are learnt and forgotten.
    init: (seed) -> variables of an untrained model.
    template: shapes of these variables.

  Args:
    config: validated configuration.
    request: unlearning request; None loads that of the configuration.
    platform: platform that the model will run on; None for that of JAX here.

  Raises:
    UserError: see `request.load`.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    request: request_lib.UnlearningRequest | None = None,
    platform: str | None = None,
  ):
    self._config, self._platform = config, platform
    self.request = request or request_lib.load(config.data)
    self._image_shape = self.request.dataset.train.images.shape[1:]
    self._model = config_lib.build_model(
      config.model, num_classes=len(self.request.dataset.class_names), platform=platform
    )
    self.init = make_init(self._model, self._image_shape)
    self.template = jax.eval_shape(self.init, config.seed)

  def with_config(self, config: ml_collections.ConfigDict):
    """The same data and model under a configuration that differs only in hyperparameters and seeds."""
    other = copy.copy(self)
    other._config = config
    return other

  @property
  def inputs(self) -> dict[str, Any]:
    """All that every stage depends on, as JSON values."""
    return {"normalization": [self._config.data.mean, self._config.data.std]}

  @property
  def evaluation_inputs(self) -> dict[str, Any]:
    """Nothing: evaluations depend on the model and `config.evaluate` only."""
    return {}

  @property
  def unlearning_inputs(self) -> dict[str, Any]:
    """Nothing: unlearning depends on the method's options only."""
    return {}

  @property
  def provenance(self) -> dict[str, Any]:
    """Nothing: images have no further provenance."""
    return {}

  def in_training_mode(self, options: ml_collections.ConfigDict) -> bool:
    """Whether unlearning runs batch norm on the statistics of its batches."""
    return options.batch_norm == "batch"

  def microbatch(self, training_mode: bool) -> int:
    """The number of images that are differentiated at a time; 0 for a whole batch.

    Batch statistics in training mode need the whole batch.
    """
    if training_mode:
      return 0
    height, width = self._image_shape[:2]
    return self._config.method.microbatch or models.microbatch_size(height, width, self._platform)

  def forward(self, pairing: str):
    """See `make_forward`; training statistics are shared by all devices of a role."""
    axis = pairing_lib.DATA_AXIS if pairing == "pmap" else None
    return make_forward(self._model, self._config.data.mean, self._config.data.std, axis)

  def fetch(self, augment: str):
    """See `make_fetch`."""
    return make_fetch(augment)

  def feed(self, split: Paired) -> feed_lib.ResidentImages | feed_lib.StreamedImages:
    """The feed of the training images."""
    kind = feed_lib.StreamedImages if self._config.data.stream else feed_lib.ResidentImages
    return kind(self.request.feed_data(split))

  def base(self, mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    """Nothing: all variables of the model are trained."""
    del mesh
    return {}

  def evaluator(
    self, split: Paired, scores: np.ndarray | None, mesh: jax.sharding.Mesh | None
  ) -> evaluation.Evaluator:
    """The evaluator of all splits.

    Args:
      split: Paired indices of training examples.
      scores: [n] memorization scores, if the forget set depends on them.
      mesh: devices that share an evaluation, None for the default device.
    """
    data = self._config.data
    return self._evaluator_of(
      mesh,
      evaluation_splits(
        self.request.dataset,
        split,
        self.request.validation,
        data.forget_class if data.forget == "class" else (),
        self.request.levels(scores),
      ),
    )

  def training_evaluator(self, mesh: jax.sharding.Mesh | None) -> evaluation.Evaluator:
    """The evaluator of the available training images, in order."""
    train = self.request.dataset.train
    return self._evaluator_of(mesh, {"train": Examples(train.images, train.labels, self.request.available)})

  def selection_score(self, summary: Mapping[str, Any]) -> float:
    """See `evaluation.selection_score`."""
    return evaluation.selection_score(summary)

  def _evaluator_of(
    self, mesh: jax.sharding.Mesh | None, splits: Mapping[str, Examples]
  ) -> evaluation.Evaluator:
    # Evaluation needs no statistics across devices, so the pairing does not matter.
    return evaluation.Evaluator(self.forward("sequential"), splits, self._config.evaluate.batch_size, mesh)

  def final_evaluations(self, evaluator: evaluation.Evaluator) -> dict[str, Any]:
    """The attacks by support vector machines and by thresholds, if they are asked for."""
    size, seed = self._config.evaluate.membership_size, config_lib.seed_of(self._config, "evaluate")
    if not self._config.evaluate.membership:
      return {}

    def evaluation_of(attack):
      return {"size": size, "seed": seed}, lambda variables: (
        evaluator.membership(variables, attack, size, seed),
        {},
      )

    return {
      "membership": evaluation_of(membership.svc_mia),
      "membership_thresholds": evaluation_of(threshold_mia.threshold_mia),
    }

  def compare(self, results: dict[str, Any], examples: Mapping[str, Any]) -> None:
    """Images have no comparison of their own with the retrained model."""

  def read_weights(self, path: str) -> Any:
    """See `models.load_weights`."""
    return models.load_weights(path, self.template)

  def weights_fingerprint(self, path: str) -> str:
    """The fingerprint of the file that `read_weights` reads."""
    return weights.fingerprint(path)

  def save(self, workdir: pathlib.Path, name: str, variables: Any) -> None:
    """Writes a model as a safetensors file."""
    rundir.write_bytes(workdir / f"{name}.safetensors", models.weights_bytes(variables))

  def work(self, feed: Any, stage: Any, steps: int) -> dict[str, Any]:
    """Nothing: the work of stages on images is not counted."""
    del feed, stage, steps
    return {}
