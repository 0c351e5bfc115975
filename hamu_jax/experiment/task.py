"""What a modality implements, so that an experiment can be on it: the protocols of a task and its parts.

`vision.Vision` and `language.Language` are the two of the package; `docs/examples/tabular.py` is a third one.
`tasks.register` gives a modality a name for `config.modality`.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import ml_collections
import numpy as np

from hamu_jax.engine.feed import Feed
from hamu_jax.engine.stage import Stage
from hamu_jax.paired import Paired

Tree = Any
# ({JSON values that it depends on}, variables -> (values, values of examples)).
FinalEvaluation = tuple[dict[str, Any], Callable[[Tree], tuple[dict[str, Any], dict[str, Any]]]]


class UnlearningRequest(Protocol):
  """Which examples may be learnt, and which of them are to be forgotten. Examples go by their indices."""

  @property
  def estimates_scores(self) -> bool:
    """Whether the forget set goes by memorization scores that an ensemble is still to estimate."""
    ...

  @property
  def validation(self) -> np.ndarray:
    """[V] int32 training examples that no stage learns from, ascending."""
    ...

  @property
  def fingerprint(self) -> str:
    """Of the data that is learnt; stages with another are others."""
    ...

  @property
  def available(self) -> np.ndarray:
    """[n] int32 the examples that may be learnt."""
    ...

  @property
  def original_indices(self) -> np.ndarray:
    """[n] what the available examples are called where memorization scores go by numbers."""
    ...

  def read_scores(self) -> np.ndarray | None:
    """[n] memorization scores of the available examples from a file; None if the forget set needs none."""
    ...

  def split(self, scores: np.ndarray | None) -> Paired:
    """The indices to retain and to forget, given the scores where the forget set goes by them.

    Raises:
      UserError: one of the sets would be empty, or something else is wrong with what is asked for.
    """
    ...


class Evaluator(Protocol):
  """Evaluates models on named splits."""

  @property
  def splits(self) -> Mapping[str, Any]:
    """By name; each has `indices`, the examples it consists of."""
    ...

  def summary(self, variables: Tree) -> dict[str, Any]:
    """{split: {name: value}, name: value}; tug of war compares "accuracy" of retain, forget and test."""
    ...


class EnsembleEvaluator(Protocol):
  """Evaluates the models of an ensemble, each on every example of one split."""

  def per_example(self, variables: Tree, *, members: bool = False) -> dict[str, dict[str, np.ndarray]]:
    """{split: {"correct": [models, n] bool, ...}}, of variables with a leading axis of models."""
    ...


class Task(Protocol):
  """An experiment's data and model, whatever its examples are.

  Attributes:
    init: seed -> the variables {"params", "batch_stats"} of an untrained model, jittable.
    template: their shapes.
  """

  init: Callable[[Any], Tree]
  template: Tree

  @property
  def request(self) -> UnlearningRequest:
    """Which examples are learnt and forgotten."""
    ...

  def with_config(self, config: ml_collections.ConfigDict) -> "Task":
    """The same data and model under a configuration that differs in hyperparameters and seeds alone."""
    ...

  # What stages depend on, as JSON values: each enters the key of what it decides.

  @property
  def inputs(self) -> dict[str, Any]:
    """What every stage depends on, beside `config.model`, `config.seed` and the request."""
    ...

  @property
  def unlearning_inputs(self) -> dict[str, Any]:
    """What unlearning depends on beside the method's options."""
    ...

  @property
  def evaluation_inputs(self) -> dict[str, Any]:
    """What evaluations depend on beside the model and `config.evaluate`."""
    ...

  @property
  def provenance(self) -> dict[str, Any]:
    """What else the results come from, for `summary.json`."""
    ...

  # What steps are made of.

  def forward(self, pairing: str) -> Callable[..., Any]:
    """(variables, batch, key, train) -> (`objectives.Outputs`, batch_stats) under a pairing."""
    ...

  def fetch(self, augment: str) -> Callable[..., Any]:
    """(data of the feed, indices [B], key) -> batch with "label", "mask", "index" and "forget"."""
    ...

  def feed(self, split: Paired) -> Feed:
    """What delivers the training examples."""
    ...

  def base(self, mesh: jax.sharding.Mesh | None) -> dict[str, Tree]:
    """The collections of variables that no stage trains, on these devices; {} where all are trained."""
    ...

  def in_training_mode(self, options: ml_collections.ConfigDict) -> bool:
    """Whether unlearning with these options (`config.method`) runs the model in training mode."""
    ...

  def microbatch(self, training_mode: bool) -> int:
    """Examples that are differentiated at a time; 0 takes a batch whole."""
    ...

  # What is measured.

  def evaluator(self, split: Paired, scores: np.ndarray | None, mesh: jax.sharding.Mesh | None) -> Evaluator:
    """Evaluates every split of the task, on the devices of the mesh or the default one."""
    ...

  def training_evaluator(self, mesh: jax.sharding.Mesh | None) -> EnsembleEvaluator:
    """Evaluates one split, the available training examples in order; for memorization ensembles alone."""
    ...

  def selection_score(self, summary: Mapping[str, Any]) -> float:
    """The score by which training keeps its best evaluated model, of a summary of `evaluator`."""
    ...

  def final_evaluations(self, evaluator: Any) -> dict[str, FinalEvaluation]:
    """By kind, what is measured of the final models alone."""
    ...

  def compare(self, results: dict[str, Any], examples: Mapping[str, Any]) -> None:
    """Adds to the results of each model what compares it with the retrained one.

    Args:
      results: {"original", "retrained", "unlearned": summary and final evaluations}.
      examples: by model and kind, the final evaluations' values of examples.
    """
    ...

  # Files.

  def read_weights(self, path: str) -> Tree:
    """The trained variables in a file or folder (`config.model.weights`).

    Raises:
      UserError: they are of another model, or cannot be read.
    """
    ...

  def weights_fingerprint(self, path: str) -> str:
    """Of what `read_weights` reads."""
    ...

  def save(self, workdir: pathlib.Path, name: str, variables: Tree) -> None:
    """Leaves a model in the run directory, in a format that others read."""
    ...

  def work(self, feed: Feed, stage: Stage, steps: int) -> dict[str, Any]:
    """How much the first steps of a stage compute, such as "tokens"; {} where nothing is counted."""
    ...
