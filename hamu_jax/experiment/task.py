"""The protocols of a task and its parts, which a modality implements.

The package implements `vision.task.Vision` and `language.task.Language`; `docs/examples/tabular.py` is a
third task. `tasks.register` gives a modality a name for `config.modality`.
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
# ({JSON values that it depends on}, (variables) -> (values, values of single examples)).
FinalEvaluation = tuple[dict[str, Any], Callable[[Tree], tuple[dict[str, Any], dict[str, Any]]]]


class UnlearningRequest(Protocol):
  """The examples that may be learnt and those to forget; examples are given by their indices."""

  @property
  def estimates_scores(self) -> bool:
    """Whether the forget set depends on memorization scores that an ensemble has yet to estimate."""
    ...

  @property
  def validation(self) -> np.ndarray:
    """[V] int32 indices of the training examples that no stage learns from, ascending."""
    ...

  @property
  def fingerprint(self) -> str:
    """A fingerprint of the training data, which enters the keys of all stages."""
    ...

  @property
  def available(self) -> np.ndarray:
    """[n] int32 indices of the examples that may be learnt."""
    ...

  @property
  def original_indices(self) -> np.ndarray:
    """[n] the indices that files of memorization scores have for the available examples."""
    ...

  def read_scores(self) -> np.ndarray | None:
    """[n] memorization scores of the available examples, from a file; None if none are needed."""
    ...

  def split(self, scores: np.ndarray | None) -> Paired:
    """The indices of the retain and forget examples.

    Args:
      scores: [n] memorization scores, if the forget set depends on them.

    Raises:
      UserError: one of the sets would be empty, or the request is wrong otherwise.
    """
    ...


class Evaluator(Protocol):
  """Evaluates models on named splits."""

  @property
  def splits(self) -> Mapping[str, Any]:
    """The splits by name; each has `indices` of its examples."""
    ...

  def summary(self, variables: Tree) -> dict[str, Any]:
    """The values {split: {name: value}, name: value}.

    Tug of war compares "accuracy" of the splits retain, forget and test.
    """
    ...


class EnsembleEvaluator(Protocol):
  """Evaluates the models of an ensemble, each on every example of one split."""

  def per_example(self, variables: Tree, *, members: bool = False) -> dict[str, dict[str, np.ndarray]]:
    """The values {split: {"correct": [models, n] bool, ...}} of variables with a leading axis of models."""
    ...


class Task(Protocol):
  """The data and the model of an experiment.

  Attributes:
    init: (seed) -> the variables {"params", "batch_stats"} of an untrained model, jittable.
    template: shapes of these variables.
  """

  init: Callable[[Any], Tree]
  template: Tree

  @property
  def request(self) -> UnlearningRequest:
    """The examples that are learnt and forgotten."""
    ...

  def with_config(self, config: ml_collections.ConfigDict) -> "Task":
    """The same data and model under a configuration that differs only in hyperparameters and seeds."""
    ...

  # What stages depend on, as JSON values, which enter the keys of stages and evaluations.

  @property
  def inputs(self) -> dict[str, Any]:
    """All that every stage depends on, besides `config.model`, `config.seed` and the request."""
    ...

  @property
  def unlearning_inputs(self) -> dict[str, Any]:
    """All that unlearning depends on, besides the method's options."""
    ...

  @property
  def evaluation_inputs(self) -> dict[str, Any]:
    """All that evaluations depend on, besides the model and `config.evaluate`."""
    ...

  @property
  def provenance(self) -> dict[str, Any]:
    """Further provenance of the results, for `summary.json`."""
    ...

  # Parts of a step.

  def forward(self, pairing: str) -> Callable[..., Any]:
    """Makes (variables, batch, key, train) -> (`objectives.Outputs`, batch_stats) for a pairing."""
    ...

  def fetch(self, augment: str) -> Callable[..., Any]:
    """Makes (data of the feed, indices [B], key) -> batch with "label", "mask", "index" and "forget"."""
    ...

  def feed(self, split: Paired) -> Feed:
    """The feed of the training examples."""
    ...

  def base(self, mesh: jax.sharding.Mesh | None) -> dict[str, Tree]:
    """The collections of variables that no stage trains, on these devices; {} if all are trained."""
    ...

  def in_training_mode(self, options: ml_collections.ConfigDict) -> bool:
    """Whether unlearning with these options (`config.method`) runs the model in training mode."""
    ...

  def microbatch(self, training_mode: bool) -> int:
    """The number of examples that are differentiated at a time; 0 takes a whole batch."""
    ...

  # Evaluation.

  def evaluator(self, split: Paired, scores: np.ndarray | None, mesh: jax.sharding.Mesh | None) -> Evaluator:
    """The evaluator of all splits, on the devices of the mesh or the default device."""
    ...

  def training_evaluator(self, mesh: jax.sharding.Mesh | None) -> EnsembleEvaluator:
    """The evaluator of the available training examples, in order; only for memorization ensembles."""
    ...

  def selection_score(self, summary: Mapping[str, Any]) -> float:
    """The score by which training keeps its best evaluated model, from a summary of `evaluator`."""
    ...

  def final_evaluations(self, evaluator: Any) -> dict[str, FinalEvaluation]:
    """The evaluations of final models only, by kind."""
    ...

  def compare(self, results: dict[str, Any], examples: Mapping[str, Any]) -> None:
    """Adds comparisons with the retrained model to the results of each model.

    Args:
      results: summaries and final evaluations of "original", "retrained" and "unlearned".
      examples: values of single examples, by model and kind of final evaluation.
    """
    ...

  # Files.

  def read_weights(self, path: str) -> Tree:
    """Reads trained variables from a file or folder (`config.model.weights`).

    Raises:
      UserError: they belong to another model, or cannot be read.
    """
    ...

  def weights_fingerprint(self, path: str) -> str:
    """A fingerprint of what `read_weights` reads."""
    ...

  def save(self, workdir: pathlib.Path, name: str, variables: Tree) -> None:
    """Writes a model to the run directory, in a format that other libraries read."""
    ...

  def work(self, feed: Feed, stage: Stage, steps: int) -> dict[str, Any]:
    """The amount of work of the first steps of a stage, such as "tokens"; {} if nothing is counted."""
    ...
