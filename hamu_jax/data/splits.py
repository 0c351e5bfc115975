"""Which training rows are to be forgotten, and which are retained.

`default_rng` and nothing else draws here, so the same seed gives the same split everywhere.
"""

import json
import math
import pathlib
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hamu_jax.errors import UserError, first_line
from hamu_jax.paired import Paired
from sam_jax import memorization

# The forget set of rho = 1: a random tenth of all rows.
RANDOM_SHARE = 0.1


class ForgetSpec(NamedTuple):
  """How the forget set is chosen: the fields of `config.data` that the kinds read."""

  forget_class: tuple[int, ...]
  hard_probability: float
  forget_fraction: float
  forget_indices: str
  memorization_level: str
  forget_size: int
  scores: np.ndarray | None  # [N] memorization score of each row


def _complement(rows: np.ndarray, total: int) -> np.ndarray:
  """Returns the rows of 0..total-1 that are not in `rows`, ascending."""
  kept = np.ones(total, bool)
  kept[rows] = False
  return np.flatnonzero(kept)


def _class_rows(labels: np.ndarray, spec: ForgetSpec) -> np.ndarray:
  """Returns the rows of the chosen classes, ascending."""
  present = np.unique(labels)
  unknown = [label for label in spec.forget_class if label not in present]
  if unknown or not spec.forget_class:
    problem = f"class {unknown[0]} does not exist" if unknown else "no class is chosen"
    raise UserError(
      f"config.data.forget_class={tuple(spec.forget_class)}: {problem}; choose from"
      f" {', '.join(map(str, present))}"
    )
  return np.flatnonzero(np.isin(labels, spec.forget_class))


def _by_class(labels: np.ndarray, spec: ForgetSpec, rng: np.random.Generator) -> Paired:
  """Forgets whole classes."""
  del rng
  forget = _class_rows(labels, spec)
  return Paired(_complement(forget, len(labels)), forget)


def _random(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> Paired:
  """Forgets a random share of all rows: the first ceil(fraction * N) of a permutation."""
  if not 0 < fraction < 1:
    raise UserError(f"config.data.forget_fraction={fraction}: choose a share between 0 and 1")
  # Without the allowance, 0.07 * 100 = 7.000000000000001 would be 8 rows.
  size = math.ceil(fraction * len(labels) - 1e-9)
  order = rng.permutation(len(labels))
  return Paired(order[size:], order[:size])


def _by_fraction(labels: np.ndarray, spec: ForgetSpec, rng: np.random.Generator) -> Paired:
  return _random(labels, spec.forget_fraction, rng)


def _hard_probability(labels: np.ndarray, spec: ForgetSpec, rng: np.random.Generator) -> Paired:
  """Replaces a share rho of a class's rows by rows of the whole training set.

  With n rows of the class, k = int(rho n): permute them and drop the first k; permute the others
  followed by the dropped, and append the first k of these. rho = 1 forgets a random tenth of all
  rows, whatever the class; rho = 0 is the class.
  """
  rho = spec.hard_probability
  if not 0 <= rho <= 1:
    raise UserError(f"config.data.hard_probability={rho}: choose a probability in [0, 1]")
  if rho == 1:
    return _random(labels, RANDOM_SHARE, rng)
  own = _class_rows(labels, spec)
  if rho == 0:
    return Paired(_complement(own, len(labels)), own)
  replaced = int(rho * len(own))
  others = _complement(own, len(labels))
  own = rng.permutation(own)
  candidates = rng.permutation(np.concatenate([others, own[:replaced]]))
  forget = np.concatenate([own[replaced:], candidates[:replaced]])
  return Paired(_complement(forget, len(labels)), forget)


def _by_indices(labels: np.ndarray, spec: ForgetSpec, rng: np.random.Generator) -> Paired:
  """Forgets the rows listed in a file, in its order."""
  del rng
  field = f"config.data.forget_indices={spec.forget_indices!r}"
  rows = read_indices(spec.forget_indices)
  outside = rows[(rows < 0) | (rows >= len(labels))]
  if len(outside):
    raise UserError(
      f"{field}: row {outside[0]} is outside the loaded training rows 0..{len(labels) - 1}"
      f" ({len(outside)} such rows); rows count after config.data.train_size"
    )
  values, counts = np.unique(rows, return_counts=True)
  if len(values) < len(rows):
    raise UserError(f"{field}: row {values[counts.argmax()]} is listed {counts.max()} times")
  return Paired(_complement(rows, len(labels)), rows)


def _by_memorization(labels: np.ndarray, spec: ForgetSpec, rng: np.random.Generator) -> Paired:
  """Forgets rows that are memorized strongly, halfway or hardly, in the order of selection."""
  del rng
  if spec.scores is None or np.shape(spec.scores) != (len(labels),):
    problem = "none are given"
    if spec.scores is not None:
      problem = f"{np.shape(spec.scores)} are given for {len(labels)} rows"
    raise UserError(
      "config.data.forget='memorization' needs one memorization score a training row, but"
      f" {problem}: name a score file in config.data.scores"
    )
  if spec.memorization_level not in memorization.LEVELS:
    raise UserError(
      f"config.data.memorization_level={spec.memorization_level!r}: choose from"
      f" {', '.join(memorization.LEVELS)}"
    )
  if not 0 < spec.forget_size < len(labels):
    raise UserError(
      f"config.data.forget_size={spec.forget_size}: there are {len(labels)} training rows, so"
      f" choose 1..{len(labels) - 1}"
    )
  forget = memorization.select(spec.scores, spec.forget_size, spec.memorization_level)
  return Paired(_complement(forget, len(labels)), forget)


def read_indices(path: str) -> np.ndarray:
  """Reads row numbers from a file.

  Args:
    path: `.npy` with one integer vector, `.npz` with just one such array, `.json` with a list of
      integers, or `.txt` with integers separated by white space.

  Returns:
    [n] int64, in the file's order, unchecked.

  Raises:
    UserError: if the file is missing or does not hold row numbers. Nothing is ever unpickled.
  """
  field = f"config.data.forget_indices={path!r}"
  readers = {".npy": _read_numpy, ".npz": _read_numpy, ".json": _read_json, ".txt": _read_text}
  file = pathlib.Path(path)
  if not file.is_file():
    raise UserError(f"{field}: no such file; give row numbers in {', '.join(readers)}")
  if file.suffix not in readers:
    raise UserError(f"{field}: choose a file of type {', '.join(readers)}")
  try:
    rows = readers[file.suffix](file)
  except (EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
    raise UserError(f"{field}: cannot be read as row numbers ({first_line(error)})") from None
  if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
    raise UserError(f"{field}: needs one vector of integers, but holds {rows.dtype} of shape {rows.shape}")
  return rows.astype(np.int64)


def _read_numpy(file: pathlib.Path) -> np.ndarray:
  loaded = np.load(file, allow_pickle=False)
  if isinstance(loaded, np.ndarray):
    return loaded
  with loaded:
    if len(loaded.files) != 1:
      raise ValueError(f"it holds {len(loaded.files)} arrays where one is needed")
    return loaded[loaded.files[0]]


def _read_json(file: pathlib.Path) -> np.ndarray:
  return np.array(json.loads(file.read_text()))


def _read_text(file: pathlib.Path) -> np.ndarray:
  return np.array([int(word) for word in file.read_text().split()])


FORGET_KINDS = {
  "class": _by_class,
  "hard_probability": _hard_probability,
  "random": _by_fraction,
  "indices": _by_indices,
  "memorization": _by_memorization,
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
  duplicates: int = 0,
) -> Paired:
  """Divides the training rows into a retain and a forget set.

  The order of the rows is the reference's, which batches are then shuffled from: retain ascends,
  except that of a random share both sets keep the order of their permutation.

  Args:
    kind: a key of `FORGET_KINDS`.
    labels: [N] class numbers of the training rows.
    seed: of the random kinds; all methods and stages of an experiment must use the same.
    forget_class: classes to forget, for `class` and `hard_probability`.
    hard_probability: rho, the share of these rows that is replaced by rows of all classes.
    forget_fraction: share of all rows, for `random`.
    forget_indices: file of row numbers, for `indices`; see `read_indices`.
    memorization_level: for `memorization`, which rows; see `sam_jax.memorization.select`.
    forget_size: for `memorization`, how many rows.
    scores: [N] memorization scores, for `memorization`; see `hamu_jax.data.read_scores`.
    duplicates: how many copies of each forget row are added to the end of the retain set.

  Returns:
    Paired row numbers, int32; disjoint and together all rows, but for `duplicates`.

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
  )
  split = FORGET_KINDS[kind](labels, spec, np.random.default_rng(seed))
  for role, rows in split._asdict().items():
    if not len(rows):
      raise UserError(
        f"config.data.forget={kind!r}: the {role} set is empty ({len(split.forget)} of"
        f" {len(labels)} training rows are to be forgotten)"
      )
  retain = np.concatenate([split.retain, np.tile(split.forget, duplicates)])
  return Paired(retain.astype(np.int32), split.forget.astype(np.int32))


def validation_rows(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
  """Chooses the rows that are validated on, and neither trained on nor forgotten.

  Of each class, in ascending order, the first round(fraction n) of a permutation of its n rows.
  Stages that take the same labels, fraction and seed hold the same rows out.

  Args:
    labels: [N] class numbers of the training rows.
    fraction: share of each class; 0 for no validation.
    seed: of the permutations.

  Returns:
    [n] int64 row numbers, ascending.

  Raises:
    UserError: for a fraction outside [0, 1).
  """
  if not 0 <= fraction < 1:
    raise UserError(f"config.data.validation_fraction={fraction}: choose a share in [0, 1)")
  rng = np.random.default_rng(seed)
  chosen = []
  for label in np.unique(labels):
    rows = rng.permutation(np.flatnonzero(labels == label))
    chosen.append(rows[: round(fraction * len(rows))])
  return np.sort(np.concatenate(chosen))
