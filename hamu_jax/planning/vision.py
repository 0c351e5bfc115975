"""The device program of an experiment on images, from the sizes of its dataset alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from hamu_jax import data as data_lib
from hamu_jax.data import dataset as dataset_lib
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.errors import UserError
from hamu_jax.planning import abstract_stage
from hamu_jax.vision import feed as feed_lib
from hamu_jax.vision import request as request_lib
from hamu_jax.vision import task as vision

Tree = Any
# The platform of the programs, also if CPU devices simulate it.
_PLATFORM = "tpu"


class Sizes(NamedTuple):
  """The sizes of a dataset.

  Attributes:
    name: name in messages.
    examples: number of training examples.
    shape: shape (H, W, C) of an image; None if images differ in size.
    classes: number of classes.
  """

  name: str
  examples: int
  shape: tuple[int, int, int] | None
  classes: int


_CIFAR10 = Sizes("CIFAR-10", 50_000, (32, 32, 3), 10)
_CIFAR100 = Sizes("CIFAR-100", 50_000, (32, 32, 3), 100)
_IMAGENET = Sizes("ImageNet-1k", 1_281_167, None, 1000)
# By `config.data.name` at their sources.
DATASETS = {
  "uoft-cs/cifar10": _CIFAR10,
  "cifar10": _CIFAR10,
  "uoft-cs/cifar100": _CIFAR100,
  "cifar100": _CIFAR100,
  "ILSVRC/imagenet-1k": _IMAGENET,
  "imagenet2012": _IMAGENET,
}
# By `config.data.source`, for sources with one dataset.
_OF_SOURCES = {"cifar10_binary": _CIFAR10, "digits": Sizes("digits", 1438, (8, 8, 1), 10)}


def find_sizes(config: ml_collections.ConfigDict) -> Sizes:
  """The sizes of the dataset of `config.data`, with images of `image_size`.

  Raises:
    UserError: the dataset is not known, or its images differ in size.
  """
  if config.forget == "separate":
    raise UserError(
      "config.data.forget='separate': the sizes of separate datasets are not known without them; plan with "
      "config.data.forget='random_size' and their total"
    )
  sizes = _OF_SOURCES.get(config.source) or DATASETS.get(config.name)
  if sizes is None:
    raise UserError(
      f"config.data.name={config.name!r}: the sizes of this dataset are not known without it; plan with "
      f"one of {', '.join(DATASETS)}"
    )
  if config.image_size:
    sizes = sizes._replace(shape=(config.image_size, config.image_size, 3))
  if sizes.shape is None:
    raise UserError(
      f"config.data.image_size=0: the images of {sizes.name} differ in size; set the size to which they are "
      "resized"
    )
  return sizes


def make_request(config: ml_collections.ConfigDict, sizes: Sizes) -> request_lib.UnlearningRequest:
  """Makes a request with black images, whose classes differ by at most one in their number of examples.

  Args:
    config: `config.data`.
    sizes: sizes of the dataset.

  Raises:
    UserError: see `request.hold_out`.
  """
  labels = np.arange(sizes.examples, dtype=np.int32) % sizes.classes
  indices = dataset_lib.choose_subset(labels, config.train_size, config.seed, "config.data.train_size")
  # A view of one black pixel takes no memory.
  assert sizes.shape is not None  # As `find_sizes` makes sure.
  images = np.broadcast_to(np.zeros((), np.uint8), (len(indices), *sizes.shape))
  split = data_lib.ImageSplit(images, labels[indices])
  return request_lib.hold_out(
    config,
    data_lib.Dataset(
      sizes.name,
      split,
      split,
      tuple(map(str, range(sizes.classes))),
      fingerprint="",
      train_indices=indices,
      train_total=sizes.examples,
      train_names=None,
    ),
  )


class AbstractStage(abstract_stage.AbstractStage):
  """A stage of an experiment on images.

  Args:
    config: validated configuration. Memorization scores, if needed, must be "estimate".
    devices: devices to choose from; they need not exist.
    stage: one of `abstract_stage.STAGES`.

  Raises:
    UserError: the experiment cannot run on these devices, or the dataset is not known.
  """

  examples = "images"

  def __init__(self, config: ml_collections.ConfigDict, devices: Sequence[Any], stage: str = "unlearn"):
    self._sizes = find_sizes(config.data)
    task = vision.Vision(config, make_request(config.data, self._sizes), _PLATFORM)
    split = task.request.split(None)
    super().__init__(config, task, split, devices, stage)
    self._feed = task.feed(split)
    self._images = task.request.feed_data(split)

  @property
  def examples_per_batch(self) -> int:
    """The number of images of a role's batch."""
    return self.stage.plan.batch_size

  def facts(self) -> list[tuple[str, str]]:
    """What is compiled and assumed, as pairs of name and text."""
    shape = "x".join(map(str, self._images.images.shape[1:]))
    where = "all of them on each device"
    if self._config.data.stream:
      where = f"those of at most {self._feed.most_steps(self.stage.plan)} steps on their devices"
    pieces = f", {self.stage.microbatch} at a time" if self.stage.microbatch else ""
    return [
      *super().facts(),
      (
        "images",
        f"{self._sizes.name}: {len(self._images.labels):,} of {shape}, {self._sizes.classes} "
        f"classes; {where}",
      ),
      ("batch", f"at most {self.share} a role on a device{pieces}"),
    ]

  @property
  def _sharded_data(self) -> bool:
    return self._feed.sharded

  def _data(self) -> Tree:
    """Shapes of the data that the feeds of `hamu_jax.vision.feed` place."""
    leading: tuple[int, ...] = (len(self._images.labels),)
    spec = jax.sharding.PartitionSpec()
    if self._config.data.stream:
      steps = self._feed.most_steps(self.stage.plan)
      leading = (steps * self._roles * self.examples_per_batch,)
      if self._mesh is not None:
        halves, devices = self._mesh.devices.shape[0], self._mesh.devices[0].size
        leading = halves, devices, steps * self._roles // halves * self.share
        spec = jax.sharding.PartitionSpec(pairing_lib.ROLE_AXIS, pairing_lib.SHARE_AXES)
    return self._placed(
      feed_lib.ImageData(
        *(jax.ShapeDtypeStruct((*leading, *leaf.shape[1:]), leaf.dtype) for leaf in self._images)
      ),
      spec,
    )
