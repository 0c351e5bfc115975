"""What an experiment on texts learns and what it forgets."""

from typing import NamedTuple

import numpy as np

from hamu_jax.paired import Paired


class TextRequest(NamedTuple):
  """Which texts are learnt and which of them are forgotten; an `experiment.task.UnlearningRequest`.

  Attributes:
    fingerprint: of the texts that are learnt.
    indices: the examples to retain and to forget, which follow each other.
  """

  fingerprint: str
  indices: Paired

  @property
  def estimates_scores(self) -> bool:
    """Forget sets of texts go by no scores."""
    return False

  @property
  def validation(self) -> np.ndarray:
    """No texts are held out."""
    return np.zeros(0, np.int32)

  @property
  def available(self) -> np.ndarray:
    """[n] the indices of all examples."""
    return np.concatenate(self.indices)

  @property
  def original_indices(self) -> np.ndarray:
    """[n] the same; no scores go by numbers of texts."""
    return self.available

  def read_scores(self) -> None:
    """Forget sets of texts go by no scores."""

  def split(self, scores: np.ndarray | None) -> Paired:
    """The indices by role."""
    del scores
    return self.indices
