"""The unlearning request of an experiment on images: a dataset, and its training examples by role."""

import hashlib
from typing import NamedTuple

import ml_collections
import numpy as np

from hamu_jax import data as data_lib
from hamu_jax.config import default as config_lib
from hamu_jax.config import readers
from hamu_jax.errors import UserError
from hamu_jax.paired import Paired
from hamu_jax.vision import feed
from sam_jax import memorization


class UnlearningRequest(NamedTuple):
  """A dataset and the training examples that may be learnt; an `experiment.task.UnlearningRequest`.

  Attributes:
    config: `config.data`.
    dataset: loaded dataset.
    validation: [V] int32 indices of the training examples that no stage learns from, ascending.
    available: [n] int32 indices of all other training examples, ascending.
  """

  config: ml_collections.ConfigDict
  dataset: data_lib.Dataset
  validation: np.ndarray
  available: np.ndarray

  @property
  def fingerprint(self) -> str:
    """The fingerprint of the dataset."""
    return self.dataset.fingerprint

  @property
  def estimates_scores(self) -> bool:
    """Whether the forget set depends on memorization scores that an ensemble has yet to estimate."""
    return self.config.forget == "memorization" and self.config.scores == readers.ESTIMATE

  @property
  def original_indices(self) -> np.ndarray:
    """[n] the indices of the available examples in the original training split."""
    return self.dataset.train_indices[self.available]

  def read_scores(self) -> np.ndarray | None:
    """[n] memorization scores of the available examples, from a file; None if none are needed.

    Raises:
      UserError: see `data.read_scores`.
    """
    if self.config.forget != "memorization" or self.estimates_scores:
      return None
    names = self.dataset.train_names
    return data_lib.read_scores(
      self.config.scores,
      indices=self.original_indices,
      total=self.dataset.train_total,
      names=None if names is None else names[self.available],
      ordered=self.dataset.train_ordered,
    )

  def split(self, scores: np.ndarray | None) -> Paired:
    """Splits the available examples into retain and forget examples.

    Args:
      scores: [n] memorization scores of the available examples, if the forget set depends on them. Before
        they are estimated, None checks that a split by scores is possible.

    Returns:
      Paired int32 indices.

    Raises:
      UserError: see `data.make_split`, or a listed example is held out for validation.
    """
    labels, forgotten = self.dataset.train.labels, self.dataset.forgotten
    if self.estimates_scores and scores is None:
      scores = np.zeros(len(self.available))
    if self.config.forget != "indices":
      if forgotten is not None:
        forgotten = forgotten[self.available]
      split = _make_split(self.config, labels[self.available], scores, forgotten)
      return Paired(*(self.available[indices] for indices in split))
    # A list of examples counts all training examples, also those that are held out.
    whole = _make_split(self.config, labels)
    if held_out := np.setdiff1d(whole.forget, self.available).tolist():
      raise UserError(
        f"config.data.forget_indices={self.config.forget_indices!r}: example {held_out[0]} is held out for "
        f"validation ({len(held_out)} such examples); leave them out or set config.data.validation_fraction=0"
      )
    return whole._replace(retain=whole.retain[np.isin(whole.retain, self.available)])

  def levels(self, scores: np.ndarray | None) -> dict[str, np.ndarray]:
    """Indices of the most, half and least memorized examples, as many of each as are forgotten.

    Returns:
      {level: [m] indices}; {} without scores.
    """
    if scores is None:
      return {}
    size = min(self.config.forget_size, len(self.available))
    return {
      level: self.available[memorization.select(scores, size, level)]
      for level in memorization.LEVELS
      if level != "mixed"
    }

  def feed_data(self, split: Paired) -> feed.ImageData:
    """The training split in the form that steps gather from."""
    train = self.dataset.train
    forget = np.zeros(len(train.labels), bool)
    forget[split.forget] = True
    return feed.ImageData(train.images, train.labels, forget, np.arange(len(train.labels), dtype=np.int32))


def scores_fingerprint(scores: np.ndarray | None) -> str | None:
  """The hexadecimal SHA-256 of memorization scores; None without scores."""
  return None if scores is None else hashlib.sha256(scores.tobytes()).hexdigest()


def load(config: ml_collections.ConfigDict) -> UnlearningRequest:
  """Loads the dataset and holds out its validation examples.

  Args:
    config: `config.data`.

  Raises:
    UserError: see `data.load` and `hold_out`.
  """
  return hold_out(config, config_lib.load_dataset(config))


def hold_out(config: ml_collections.ConfigDict, dataset: data_lib.Dataset) -> UnlearningRequest:
  """Makes the request of a dataset and holds out its validation examples.

  Args:
    config: `config.data`.
    dataset: loaded dataset.

  Raises:
    UserError: no example would be held out although `validation_fraction` is set, or the number of means is
      not that of channels.
  """
  channels = dataset.train.images.shape[-1]
  if len(config.mean) != channels:
    raise UserError(
      f"config.data.mean={tuple(config.mean)}: the images have {channels} channel(s); give "
      "config.data.mean and config.data.std one value for each"
    )
  labels = dataset.train.labels
  validation = data_lib.validation_indices(labels, config.validation_fraction, config.seed)
  if config.validation_fraction and not len(validation):
    raise UserError(
      f"config.data.validation_fraction={config.validation_fraction!r}: holds out no example of classes of "
      f"at most {np.bincount(labels).max()} examples; choose a larger share, or 0"
    )
  available = np.setdiff1d(np.arange(len(labels)), validation)
  return UnlearningRequest(config, dataset, validation.astype(np.int32), available.astype(np.int32))


def _make_split(
  config,
  labels: np.ndarray,
  scores: np.ndarray | None = None,
  forgotten: np.ndarray | None = None,
) -> Paired:
  return data_lib.make_split(
    config.forget,
    labels,
    seed=config.seed,
    forget_class=config.forget_class,
    hard_probability=config.hard_probability,
    forget_fraction=config.forget_fraction,
    forget_indices=config.forget_indices,
    memorization_level=config.memorization_level,
    forget_size=config.forget_size,
    scores=scores,
    forgotten=forgotten,
    duplicates=config.duplicates,
  )
