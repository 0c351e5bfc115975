"""Features of models: the entanglement of retain and forget examples, and a map of both.

Axis legend: N examples of a set, D features.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hamu_jax.analysis.examples import Run, microbatches
from hamu_jax.errors import UserError
from hamu_jax.paired import Paired
from hamu_jax.run import compilation, progress
from hamu_jax.vision import task as vision
from sam_jax import entanglement

Tree = Any

NEIGHBOURS = 10
# Measures of entanglement, each with the number of examples of a class that both sets must have.
_MEASURES: dict[str, tuple[Callable[..., Any], int]] = {
  "variance_ratio": (entanglement.variance_entanglement, 1),
  "variance": (
    functools.partial(entanglement.variance_entanglement, normalizer=entanglement.REFERENCE_NORMALIZER),
    1,
  ),
  "wasserstein": (entanglement.wasserstein_entanglement, 2),
  "silhouette": (entanglement.silhouette_entanglement, 2),
  "svm": (entanglement.svm_entanglement, entanglement.SVM_FOLDS),
  "knn": (functools.partial(entanglement.knn_entanglement, k=NEIGHBOURS), NEIGHBOURS + 1),
}


def extract_features(run: Run, variables: Mapping[str, Tree]) -> dict[str, Paired]:
  """Computes the inputs of the classifier in evaluation mode.

  Args:
    run: The run.
    variables: Variables by name of the model.

  Returns:
    {name of the model: Paired [N, D] features}.

  Raises:
    UserError: if the features are not finite.
  """
  forward = compilation.jit(vision.make_features(run.model, run.config.data.mean, run.config.data.std))
  batches = Paired(*(microbatches(examples, len(examples.labels))[0] for examples in run.examples))
  collected = {name: Paired([], []) for name in variables}
  jobs = [
    (name, role, batch) for name in variables for role in Paired._fields for batch in getattr(batches, role)
  ]
  with progress.Progress("features", len(jobs)) as bar:
    for step, (name, role, batch) in enumerate(jobs, start=1):
      getattr(collected[name], role).append(np.asarray(forward(variables[name], batch)))
      bar.update(step)
  features = {
    name: Paired(
      *(
        np.concatenate(parts)[: len(examples.labels)].reshape(len(examples.labels), -1)
        for parts, examples in zip(sets, run.examples)
      )
    )
    for name, sets in collected.items()
  }
  for name, sets in features.items():
    if not all(np.isfinite(features_NxD).all() for features_NxD in sets):
      raise UserError(
        f"the features of the model {name!r} are not finite, so it has diverged; choose another run or model"
      )
  return features


def measure(features: Paired, examples: Paired, seed: int) -> dict[str, dict[str, float | None]]:
  """Entanglement of retain and forget features by every measure, global and class-wise.

  Args:
    features: Paired [N, D] features.
    examples: Paired `Examples`.
    seed: Seed of the Wasserstein measure's samples.

  Returns:
    ``{"global" | "class_wise": {measure: value}}``. A class-wise value is None if no class has enough
    examples in both sets, for example if whole classes are forgotten.
  """
  labels = {"retain_labels": examples.retain.labels, "forget_labels": examples.forget.labels}
  sizes = [len(features_NxD) for features_NxD in features]
  report: dict[str, dict[str, Any]] = {"global": {}, "class_wise": {}}
  for name, (function, least) in _MEASURES.items():
    options = {"seed": seed} if name == "wasserstein" else {}
    if min(sizes) >= least:
      report["global"][name] = function(*features, **options)
    if entanglement.shared_classes(examples.retain.labels, examples.forget.labels, least):
      report["class_wise"][name] = function(*features, **labels, **options)
  return {kind: {name: values.get(name) for name in _MEASURES} for kind, values in report.items()}


def project(features: Mapping[str, Paired], seed: int) -> dict[str, Paired]:
  """Embeds the features of all models and sets in one UMAP with cosine distance.

  The embedding is common, so that a position means the same for each model and movements are visible.
  Models that are far apart (before and after retraining, for example) form separate islands; the
  neighbourhood of retain and forget within each can still be compared.

  Args:
    features: {name of the model: Paired [N, D] features}.
    seed: Seed of the embedding.

  Returns:
    {name of the model: Paired [N, 2] positions}.
  """
  from umap import UMAP

  arrays = [features_NxD for sets in features.values() for features_NxD in sets]
  stacked = np.concatenate(arrays)
  embedding = UMAP(
    n_neighbors=min(15, len(stacked) - 1),
    metric="cosine",
    random_state=seed,
    n_jobs=1,
  ).fit_transform(stacked)
  places = iter(np.split(embedding, np.cumsum([len(array) for array in arrays])[:-1]))
  return {name: Paired(*(next(places) for _ in sets)) for name, sets in features.items()}
