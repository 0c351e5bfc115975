"""Entanglement: how much the features of the forget set are mixed with those of the retain set.

There are five measures; each is larger the harder the sets are to tell apart. Features are first divided by
their Euclidean norm. With the labels of both sets, a measure is class-wise: it is computed within each class
that both sets have, and averaged with the sizes of the classes as weights.

Source: Sharpness-Aware Machine Unlearning (arXiv 2506.13715); the variance ratio is Zhao et al.'s
(arXiv 2406.01257). The paper's code differs in three points. Sets with equal means have entanglement 0, and
such classes are left out. A class-wise measure without any class is 0 instead of an error. The first
neighbour of a point is dropped as the point itself, although it is another point if two coincide.

Axis legend: N examples of a set, D features.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

# Number by which the sharpness paper divides the variance ratio.
REFERENCE_NORMALIZER = 1300.0
# Parts of the cross-validation of the SVM measure.
SVM_FOLDS = 5
_NORM_FLOOR = 1e-12
# A smaller distance between unit vectors, or between their means, is rounding error in float64.
_ROUNDING = 1e-14


def variance_entanglement(
  retain_features: ArrayLike,
  forget_features: ArrayLike,
  *,
  retain_labels: ArrayLike | None = None,
  forget_labels: ArrayLike | None = None,
  normalizer: float | None = None,
) -> float:
  r"""Spread within the sets over the distance between their means.

  .. math::
    \frac{V_R + V_F}{\frac12 (|\mu_R - \mu|^2 + |\mu_F - \mu|^2)}, \qquad
    V_S = \frac{1}{|S|} \sum_{x \in S} |x - \mu_S|^2

  Here :math:`\mu_S` is the mean of a set and :math:`\mu` that of all examples of both sets.

  Args:
    retain_features: [N_r, D] features of the retain set.
    forget_features: [N_f, D] features of the forget set.
    retain_labels: [N_r] classes, for the class-wise measure; give both or none.
    forget_labels: [N_f] classes.
    normalizer: Number by which the ratio (class-wise: the mean ratio) is divided before it is clipped to
      [0, 1]; the paper uses 1300. None returns the ratio itself, which has no upper bound.

  Returns:
    The entanglement; 1 for sets, or a class, with a denominator of 0. With a normalizer, 1 means fully
    entangled. Without one, the ratio grows without bound as the means approach each other, and 1 is then only
    a placeholder.

  Raises:
    ValueError: if a set is empty or shapes do not fit; class-wise, if no class is in both sets.
  """
  full = 1.0 if normalizer is None else normalizer

  def ratio(retain_NxD, forget_NxD):
    mean_D = np.concatenate([retain_NxD, forget_NxD]).mean(axis=0)
    within = between = 0.0
    for features_NxD in (retain_NxD, forget_NxD):
      own_mean_D = features_NxD.mean(axis=0)
      within += np.square(features_NxD - own_mean_D).sum(axis=1).mean()
      between += 0.5 * np.square(own_mean_D - mean_D).sum()
    return within / between if between > _ROUNDING**2 else full

  value = _measure(ratio, 1, retain_features, forget_features, retain_labels, forget_labels)
  return value if normalizer is None else float(np.clip(value / normalizer, 0, 1))


def wasserstein_entanglement(
  retain_features: ArrayLike,
  forget_features: ArrayLike,
  *,
  retain_labels: ArrayLike | None = None,
  forget_labels: ArrayLike | None = None,
  max_samples: int = 1000,
  seed: int = 0,
) -> float:
  r"""One minus the exact optimal transport cost between the sets.

  .. math::
    1 - \min_{T \ge 0} \sum_{ij} T_{ij} \frac{|r_i - f_j|}{\max_{kl} |r_k - f_l|}, \qquad
    \sum_j T_{ij} = 1/N_r,\ \sum_i T_{ij} = 1/N_f

  Args:
    retain_features: [N_r, D] features of the retain set.
    forget_features: [N_f, D] features of the forget set.
    retain_labels: [N_r] classes, for the class-wise measure; give both or none. Classes with fewer
      than two examples in a set are left out.
    forget_labels: [N_f] classes.
    max_samples: Largest number of examples of a set, or of a class of a set. They are drawn from a larger set
      without replacement.
    seed: Seed of that draw.

  Returns:
    The entanglement in [0, 1]; 1 if all examples coincide.

  Raises:
    ValueError: if POT is not installed, a set is empty or shapes do not fit; class-wise, if no class has
      two examples in each set.
  """
  try:
    import ot
    from scipy.spatial.distance import cdist
  except ImportError as error:
    raise ValueError(
      "the Wasserstein entanglement needs POT, which is not installed; pip install 'hamu-jax[analysis]'"
    ) from error

  def similarity(retain_NxD, forget_NxD):
    rng = np.random.default_rng(seed)
    # POT would compute distances from scalar products, which loses half the digits of small distances.
    cost_RxF = cdist(_at_most(retain_NxD, max_samples, rng), _at_most(forget_NxD, max_samples, rng))
    largest = cost_RxF.max()
    if largest <= _ROUNDING:
      return 1.0
    # Empty weights mean uniform weights.
    return max(0.0, 1 - ot.emd2([], [], cost_RxF / largest))

  return _measure(
    similarity,
    1 if retain_labels is None else 2,
    retain_features,
    forget_features,
    retain_labels,
    forget_labels,
  )


def silhouette_entanglement(
  retain_features: ArrayLike,
  forget_features: ArrayLike,
  *,
  retain_labels: ArrayLike | None = None,
  forget_labels: ArrayLike | None = None,
) -> float:
  r"""One minus the mean silhouette s of the two sets as clusters, scaled to [0, 1]: :math:`(1 - s) / 2`.

  An example with mean cosine distance a to its own set and b to the other has the silhouette
  :math:`s = (b - a) / \max(a, b)`.

  Args:
    retain_features: [N_r, D] features of the retain set.
    forget_features: [N_f, D] features of the forget set.
    retain_labels: [N_r] classes, for the class-wise measure; give both or none. Classes with fewer
      than two examples in a set are left out.
    forget_labels: [N_f] classes.

  Returns:
    The entanglement in [0, 1]; 0.5 if the sets have the same distribution.

  Raises:
    ValueError: if a set has fewer than two examples or shapes do not fit; class-wise, if no class has two
      examples in each set.
  """
  from sklearn.metrics import silhouette_score

  def turned(retain_NxD, forget_NxD):
    features_NxD, is_forget = _joined(retain_NxD, forget_NxD)
    return (1 - silhouette_score(features_NxD, is_forget, metric="cosine")) / 2

  return _measure(turned, 2, retain_features, forget_features, retain_labels, forget_labels)


def knn_entanglement(
  retain_features: ArrayLike,
  forget_features: ArrayLike,
  *,
  retain_labels: ArrayLike | None = None,
  forget_labels: ArrayLike | None = None,
  k: int = 10,
) -> float:
  """Share of examples whose k nearest neighbours are mostly in the other set.

  Distances are cosine distances; a tie counts as a majority of retain.

  Args:
    retain_features: [N_r, D] features of the retain set.
    forget_features: [N_f, D] features of the forget set.
    retain_labels: [N_r] classes, for the class-wise measure; give both or none. Classes with fewer
      than k + 1 examples in a set are left out.
    forget_labels: [N_f] classes.
    k: Number of neighbours, not counting the example itself.

  Returns:
    The entanglement in [0, 1].

  Raises:
    ValueError: if a set has fewer than k + 1 examples or shapes do not fit; class-wise, if no class has
      as many in each set.
  """
  from sklearn.neighbors import NearestNeighbors

  def misplaced(retain_NxD, forget_NxD):
    features_NxD, is_forget_N = _joined(retain_NxD, forget_NxD)
    neighbours = NearestNeighbors(n_neighbors=k, metric="cosine").fit(features_NxD)
    indices_Nxk = neighbours.kneighbors(return_distance=False)
    return np.mean((is_forget_N[indices_Nxk].mean(axis=1) > 0.5) != is_forget_N)

  return _measure(misplaced, k + 1, retain_features, forget_features, retain_labels, forget_labels)


def svm_entanglement(
  retain_features: ArrayLike,
  forget_features: ArrayLike,
  *,
  retain_labels: ArrayLike | None = None,
  forget_labels: ArrayLike | None = None,
  penalty: float = 0.01,
  seed: int = 42,
) -> float:
  """Error of a linear support vector machine that tells the sets apart, in five-fold cross-validation.

  The folds are stratified and in order. Guessing the larger set errs by the share of the smaller one, which
  is about the largest value.

  Args:
    retain_features: [N_r, D] features of the retain set.
    forget_features: [N_f, D] features of the forget set.
    retain_labels: [N_r] classes, for the class-wise measure; give both or none. Classes with fewer
      than five examples in a set are left out.
    forget_labels: [N_f] classes.
    penalty: Weight C of the errors against the norm of the weights.
    seed: Seed of the solver.

  Returns:
    The entanglement in [0, 1].

  Raises:
    ValueError: if a set has fewer than five examples or shapes do not fit; class-wise, if no class has as
      many in each set.
  """
  from sklearn.model_selection import cross_val_score
  from sklearn.svm import LinearSVC

  def error(retain_NxD, forget_NxD):
    machine = LinearSVC(C=penalty, random_state=seed)
    return 1 - cross_val_score(machine, *_joined(retain_NxD, forget_NxD), cv=SVM_FOLDS).mean()

  return _measure(error, SVM_FOLDS, retain_features, forget_features, retain_labels, forget_labels)


def shared_classes(retain_labels: ArrayLike, forget_labels: ArrayLike, least: int = 1) -> list[int]:
  """The classes that have at least `least` examples in each set, ascending.

  Args:
    retain_labels: [N_r] classes.
    forget_labels: [N_f] classes.
    least: Number of examples in each set that the class-wise measure needs: 1 for the variance, 2 for
      Wasserstein and silhouette, k + 1 for the k nearest neighbours, `SVM_FOLDS` for the SVM.
  """
  retain, forget = (
    classes[counts >= least]
    for classes, counts in (
      np.unique(labels, return_counts=True) for labels in (retain_labels, forget_labels)
    )
  )
  return np.intersect1d(retain, forget).tolist()


def _measure(
  score: Callable[[np.ndarray, np.ndarray], float],
  least: int,
  retain_features: ArrayLike,
  forget_features: ArrayLike,
  retain_labels: ArrayLike | None,
  forget_labels: ArrayLike | None,
) -> float:
  """`score` of the two sets or, given labels, its mean over the classes with `least` examples in each set."""
  retain_NxD = _normalized("retain", retain_features, least)
  forget_NxD = _normalized("forget", forget_features, least)
  if retain_NxD.shape[1] != forget_NxD.shape[1]:
    raise ValueError(
      f"entanglement: retain features have {retain_NxD.shape[1]} columns and forget features "
      f"{forget_NxD.shape[1]}; give features of one model"
    )
  if retain_labels is None and forget_labels is None:
    return float(score(retain_NxD, forget_NxD))
  retain_labels_N = _checked_labels("retain", retain_labels, retain_NxD)
  forget_labels_N = _checked_labels("forget", forget_labels, forget_NxD)
  classes = shared_classes(retain_labels_N, forget_labels_N, least)
  if not classes:
    raise ValueError(
      f"entanglement: no class has {least} example(s) in both sets, so there is no class-wise "
      "measure; leave out the labels for the global one"
    )
  scores, sizes = [], []
  for label in classes:
    retain, forget = retain_NxD[retain_labels_N == label], forget_NxD[forget_labels_N == label]
    scores.append(score(retain, forget))
    sizes.append(len(retain) + len(forget))
  return float(np.average(scores, weights=sizes))


def _normalized(name: str, features: ArrayLike, least: int) -> np.ndarray:
  """Features divided by their norm, in float64; features that are all zero stay zero."""
  features_NxD = np.asarray(features, np.float64)
  if features_NxD.ndim != 2 or len(features_NxD) < least:
    raise ValueError(
      f"entanglement: {name} features have shape {features_NxD.shape}; give [N, D] with N at least {least}"
    )
  if not np.isfinite(features_NxD).all():
    raise ValueError(
      f"entanglement: {name} features are not finite; give features of a model that has not diverged"
    )
  norms_N = np.linalg.norm(features_NxD, axis=1)
  return features_NxD / np.maximum(norms_N, _NORM_FLOOR)[:, None]


def _checked_labels(name: str, labels: ArrayLike | None, features_NxD: np.ndarray) -> np.ndarray:
  shape = None if labels is None else np.shape(labels)
  if shape != features_NxD.shape[:1]:
    raise ValueError(
      f"entanglement: {name}_labels have shape {shape} for {len(features_NxD)} examples; "
      "give one label per example for both sets, or for neither"
    )
  return np.asarray(labels)


def _at_most(features_NxD: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
  if len(features_NxD) <= count:
    return features_NxD
  return features_NxD[rng.choice(len(features_NxD), count, replace=False)]


def _joined(retain_NxD: np.ndarray, forget_NxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The features of all examples, and whether each is in the forget set."""
  is_forget_N = np.repeat([False, True], [len(retain_NxD), len(forget_NxD)])
  return np.concatenate([retain_NxD, forget_NxD]), is_forget_N
