"""The unlearning request of an experiment on texts."""

from typing import NamedTuple

import numpy as np

from hamu_jax.paired import Paired


class TextRequest(NamedTuple):
  """The texts that are learnt and those to forget; an `experiment.task.UnlearningRequest`.

  Attributes:
    fingerprint: fingerprint of the texts that are learnt.
    indices: Paired int32 indices; those of the forget texts follow those of the retain texts.
  """

  fingerprint: str
  indices: Paired

  @property
  def estimates_scores(self) -> bool:
    """Never: forget sets of texts do not depend on scores."""
    return False

  @property
  def validation(self) -> np.ndarray:
    """[0] no texts are held out."""
    return np.zeros(0, np.int32)

  @property
  def available(self) -> np.ndarray:
    """[n] the indices of all texts."""
    return np.concatenate(self.indices)

  @property
  def original_indices(self) -> np.ndarray:
    """[n] the same as `available`; there are no files of scores for texts."""
    return self.available

  def read_scores(self) -> None:
    """None: forget sets of texts do not depend on scores."""

  def split(self, scores: np.ndarray | None) -> Paired:
    """The indices of the retain and forget texts."""
    del scores
    return self.indices
