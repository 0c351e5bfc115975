"""Divides the training examples into the forget set and the retain set.

All draws are made by NumPy's `default_rng`, so the same seed gives the same split on every platform.
"""

import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hamu_jax import outside
from hamu_jax.errors import UserError
from hamu_jax.paired import Paired
from sam_jax import memorization

# Share of all examples that rho = 1 forgets, drawn at random.
RANDOM_SHARE = 0.1


class ForgetSpec(NamedTuple):
  """How the forget set is chosen: the fields of `config.data` that the kinds read."""

  forget_class: tuple[int, ...]
  hard_probability: float
  forget_fraction: float
  forget_indices: str
  memorization_level: str
  forget_size: int
  scores: np.ndarray | None  # [N] memorization score of each example
  forgotten: np.ndarray | None  # [N] whether an example comes from the forget set's own dataset


def _complement(indices: np.ndarray, total: int) -> np.ndarray:
  """Returns the examples of 0..total-1 that are not in `indices`, ascending."""
  kept = np.ones(total, bool)
  kept[indices] = False
  return np.flatnonzero(kept)


def _class_indices(labels: np.ndarray, spec: ForgetSpec) -> np.ndarray:
  """Returns the examples of the chosen classes, ascending."""
  present = np.unique(labels)
  unknown = [label for label in spec.forget_class if label not in present]
  if unknown or not spec.forget_class:
    reason = f"class {unknown[0]} does not exist" if unknown else "no class is chosen"
    raise UserError(
      f"config.data.forget_class={tuple(spec.forget_class)}: {reason}; choose from"
      f" {', '.join(map(str, present))}"
    )
  return np.flatnonzero(np.isin(labels, spec.forget_class))


def _by_class(labels: np.ndarray, spec: ForgetSpec, rng: np.random.Generator) -> Paired:
  """Forgets whole classes."""
  del rng
  forget = _class_indices(labels, spec)
  return Paired(_complement(forget, len(labels)), forget)


def _random(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> Paired:
  """Forgets a random share of all examples: the first ceil(fraction * N) of a permutation."""
  if not 0 < fraction < 1:
    raise UserError(f"config.data.forget_fraction={fraction}: choose a share between 0 and 1")
  # Without the tolerance, 0.07 * 100 = 7.000000000000001 would be 8 examples.
  size = math.ceil(fraction * len(labels) - 1e-9)
  order = rng.permutation(len(labels))
  return Paired(order[size:], order[:size])


def _by_fraction(labels: np.ndarray, spec: ForgetSpec, rng: np.random.Generator) -> Paired:
  return _random(labels, spec.forget_fraction, rng)


def _drawn(candidates: np.ndarray, what: str, labels: np.ndarray, spec: ForgetSpec, rng) -> Paired:
  """Forgets the first `forget_size` of a permutation of some examples."""
  most = min(len(candidates), len(labels) - 1)
  if not 0 < spec.forget_size <= most:
    raise UserError(
      f"config.data.forget_size={spec.forget_size}: {what} {len(candidates)} training examples, so choose"
      f" 1..{most}"
    )
  forget = rng.permutation(candidates)[: spec.forget_size]
  return Paired(_complement(forget, len(labels)), forget)


def _random_size(labels: np.ndarray, spec: ForgetSpec, rng: np.random.Generator) -> Paired:
  """Forgets a number of examples, drawn from all."""
  return _drawn(np.arange(len(labels)), "there are", labels, spec, rng)


def _class_size(labels: np.ndarray, spec: ForgetSpec, rng: np.random.Generator) -> Paired:
  """Forgets a number of examples, drawn from those of the chosen classes."""
  classes = ", ".join(map(str, spec.forget_class))
  return _drawn(_class_indices(labels, spec), f"forget_class ({classes}) has", labels, spec, rng)


def _hard_probability(labels: np.ndarray, spec: ForgetSpec, rng: np.random.Generator) -> Paired:
  """Replaces a share rho of a class's examples by examples of the whole training set.

  The class has n examples, and k = int(rho n). The class's examples are permuted and the first k dropped.
  The other examples, followed by the dropped ones, are permuted, and the first k of them appended.
  rho = 1 forgets a random tenth of all examples, whatever the class; rho = 0 forgets the class.
  """
  rho = spec.hard_probability
  if not 0 <= rho <= 1:
    raise UserError(f"config.data.hard_probability={rho}: choose a probability in [0, 1]")
  if rho == 1:
    return _random(labels, RANDOM_SHARE, rng)
  own = _class_indices(labels, spec)
  if rho == 0:
    return Paired(_complement(own, len(labels)), own)
  replaced = int(rho * len(own))
  others = _complement(own, len(labels))
  own = rng.permutation(own)
  candidates = rng.permutation(np.concatenate([others, own[:replaced]]))
  forget = np.concatenate([own[replaced:], candidates[:replaced]])
  return Paired(_complement(forget, len(labels)), forget)


def _by_indices(labels: np.ndarray, spec: ForgetSpec, rng: np.random.Generator) -> Paired:
  """Forgets the examples listed in a file, in its order."""
  del rng
  field = f"config.data.forget_indices={spec.forget_indices!r}"
  indices = read_indices(spec.forget_indices)
  outside = indices[(indices < 0) | (indices >= len(labels))]
  if len(outside):
    raise UserError(
      f"{field}: example {outside[0]} is outside the loaded training examples 0..{len(labels) - 1}"
      f" ({len(outside)} such examples); examples count after config.data.train_size"
    )
  values, counts = np.unique(indices, return_counts=True)
  if len(values) < len(indices):
    raise UserError(
      f"{field}: example {values[counts.argmax()]} is listed {counts.max()} times; list each once"
    )
  return Paired(_complement(indices, len(labels)), indices)


def _by_memorization(labels: np.ndarray, spec: ForgetSpec, rng: np.random.Generator) -> Paired:
  """Forgets examples of high, medium or low memorization, in the order of selection."""
  del rng
  if spec.scores is None or np.shape(spec.scores) != (len(labels),):
    given = "none are given"
    if spec.scores is not None:
      given = f"{np.shape(spec.scores)} are given for {len(labels)} examples"
    raise UserError(
      "config.data.forget='memorization' needs one memorization score per training example, but"
      f" {given}: name a score file in config.data.scores"
    )
  if spec.memorization_level not in memorization.LEVELS:
    raise UserError(
      f"config.data.memorization_level={spec.memorization_level!r}: choose from"
      f" {', '.join(memorization.LEVELS)}"
    )
  if not 0 < spec.forget_size < len(labels):
    raise UserError(
      f"config.data.forget_size={spec.forget_size}: there are {len(labels)} training examples, so"
      f" choose 1..{len(labels) - 1}"
    )
  forget = memorization.select(spec.scores, spec.forget_size, spec.memorization_level)
  return Paired(_complement(forget, len(labels)), forget)


def _separate(labels: np.ndarray, spec: ForgetSpec, rng: np.random.Generator) -> Paired:
  """Forgets the examples of a dataset of their own."""
  del rng
  if spec.forgotten is None:
    raise UserError(
      "config.data.forget='separate': the forget set has no dataset of its own here; name it in"
      " config.data.forget_split or config.data.forget_set"
    )
  forget = np.flatnonzero(spec.forgotten)
  return Paired(_complement(forget, len(labels)), forget)


def read_indices(path: str) -> np.ndarray:
  """Reads indices of examples from a file.

  Args:
    path: path of an `.npy` with one integer vector, an `.npz` with just one such array, a `.json` with a
      list of integers, or a `.txt` with integers separated by white space.

  Returns:
    [n] int64, in the file's order, unchecked.

  Raises:
    UserError: if the file is missing or does not hold indices. Nothing is ever unpickled.
  """
  field = f"config.data.forget_indices={path!r}"
  readers = {".npy": _read_numpy, ".npz": _read_numpy, ".json": _read_json, ".txt": _read_text}
  file = pathlib.Path(path)
  if not file.is_file():
    raise UserError(f"{field}: no such file; give example numbers in {', '.join(readers)}")
  if file.suffix not in readers:
    raise UserError(f"{field}: choose a file of type {', '.join(readers)}")
  with outside.read_of(field, "example numbers", "write it again"):
    indices = readers[file.suffix](file)
  if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
    raise UserError(
      f"{field}: needs one vector of integers, but holds {indices.dtype} of shape {indices.shape}"
    )
  return indices.astype(np.int64)


def _read_numpy(file: pathlib.Path) -> np.ndarray:
  arrays = outside.arrays_of(file)
  if len(arrays) != 1:
    raise ValueError(f"it holds {len(arrays)} arrays where one is needed")
  return next(iter(arrays.values()))


def _read_json(file: pathlib.Path) -> np.ndarray:
  return np.array(json.loads(outside.text_of(file)))


def _read_text(file: pathlib.Path) -> np.ndarray:
  words = outside.text_of(file).split()
  if wrong := [word for word in words if not re.fullmatch(r"[+-]?\d{1,18}", word)]:
    raise ValueError(f"{wrong[0][:40]!r} is no whole number")
  return np.array([int(word) for word in words])


FORGET_KINDS = {
  "class": _by_class,
  "hard_probability": _hard_probability,
  "random": _by_fraction,
  "random_size": _random_size,
  "class_size": _class_size,
  "indices": _by_indices,
  "memorization": _by_memorization,
  "separate": _separate,
}


def make_split(
  kind: str,
  labels: np.ndarray,
  *,
  seed: int,
  forget_class: Sequence[int] = (),
  hard_probability: float = 0.0,
  forget_fraction: float = RANDOM_SHARE,
  forget_indices: str = "",
  memorization_level: str = "high",
  forget_size: int = 3000,
  scores: np.ndarray | None = None,
  forgotten: np.ndarray | None = None,
  duplicates: int = 0,
) -> Paired:
  """Divides the training examples into a retain and a forget set.

  The order of the examples is the reference's, because batches are shuffled from it: retain ascends,
  except that both sets of a random share keep the order of their permutation.

  Args:
    kind: a key of `FORGET_KINDS`.
    labels: [N] class numbers of the training examples.
    seed: seed of the random kinds. All methods and stages of an experiment must use the same.
    forget_class: classes to forget, for `class`, `class_size` and `hard_probability`.
    hard_probability: rho, the share of these examples that is replaced by examples of all classes.
    forget_fraction: share of all examples, for `random`.
    forget_indices: file of indices of examples, for `indices`; see `read_indices`.
    memorization_level: level of the chosen examples, for `memorization`; see `sam_jax.memorization.select`.
    forget_size: number of examples, for `random_size`, `class_size` and `memorization`.
    scores: [N] memorization scores, for `memorization`; see `hamu_jax.data.read_scores`.
    forgotten: [N] whether each example comes from the forget set's own dataset, for `separate`.
    duplicates: number of copies of each forget example that are appended to the retain set.

  Returns:
    Paired [n] int32 indices of examples. The sets are disjoint and their union is all examples, except
    for `duplicates`.

  Raises:
    UserError: for an unknown kind or class, a value out of range, or an empty set.

  Sources: Hardness-Aware Multi-Objective Unlearning, arXiv 2606.02119 (rho is its hardness mix);
  Sharpness-Aware Unlearning, arXiv 2506.13715 (memorization).
  """
  if kind not in FORGET_KINDS:
    raise UserError(f"config.data.forget={kind!r}: choose from {', '.join(FORGET_KINDS)}")
  if duplicates < 0:
    raise UserError(f"config.data.duplicates={duplicates}: choose 0 or more")
  spec = ForgetSpec(
    tuple(forget_class),
    hard_probability,
    forget_fraction,
    forget_indices,
    memorization_level,
    forget_size,
    scores,
    forgotten,
  )
  split = FORGET_KINDS[kind](labels, spec, np.random.default_rng(seed))
  _check_not_empty(split, kind, len(labels))
  retain = np.concatenate([split.retain, np.tile(split.forget, duplicates)])
  return Paired(retain.astype(np.int32), split.forget.astype(np.int32))


def _check_not_empty(split: Paired, kind: str, total: int) -> None:
  """Refuses a split that leaves a role without examples."""
  for role, indices in split._asdict().items():
    if not len(indices):
      raise UserError(
        f"config.data.forget={kind!r}: the {role} set is empty ({len(split.forget)} of"
        f" {total} training examples are to be forgotten); choose a share that leaves both sets examples"
      )


def validation_indices(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
  """Chooses the validation examples, which are neither trained on nor forgotten.

  The n examples of each class, in ascending order of the classes, are permuted, and the first
  round(fraction n) are chosen. Stages with the same labels, fraction and seed hold out the same examples.

  Args:
    labels: [N] class numbers of the training examples.
    fraction: share of each class; 0 for no validation.
    seed: seed of the permutations.

  Returns:
    [n] int64 indices of examples, ascending.

  Raises:
    UserError: for a fraction outside [0, 1).
  """
  if not 0 <= fraction < 1:
    raise UserError(f"config.data.validation_fraction={fraction}: choose a share in [0, 1)")
  rng = np.random.default_rng(seed)
  chosen = []
  for label in np.unique(labels):
    indices = rng.permutation(np.flatnonzero(labels == label))
    chosen.append(indices[: round(fraction * len(indices))])
  return np.sort(np.concatenate(chosen))
