"""Files of memorization scores: published ones and this project's own.

An `.npz` holds the scores as `tr_mem` (Feldman and Zhang's CIFAR-100 and ImageNet files) or
`memorization` (RUM's CIFAR-10 estimates, and ours). It may also say which example each score belongs to:
`tr_filenames` holds the images' file names, `rows` the indices of examples in the original training split.
Without either, the scores are those of all examples in order, as in an `.npy` with one vector.

ImageNet's file names are an array of Python objects, that is a pickle, which could run any code
when it is loaded. They are read here without calling anything that the pickle names; see `_Unpickler`.
"""

import pathlib
import pickle
import zipfile
from typing import Any

import numpy as np

from hamu_jax import outside
from hamu_jax.errors import UserError, first_line

SUFFIXES = (".npz", ".npy")
SCORE_KEYS = ("tr_mem", "memorization")
NAMES_KEY, ROWS_KEY = "tr_filenames", "rows"


def read_scores(
  path: str,
  *,
  indices: np.ndarray,
  total: int,
  names: np.ndarray | None = None,
  ordered: bool = True,
) -> np.ndarray:
  """Reads the memorization scores of training examples.

  Args:
    path: path of an `.npz` or `.npy` file.
    indices: [N] indices, in the original training split, of the examples whose scores are wanted.
    total: number of examples of that split.
    names: [N] file names of these examples, for a file that lists scores by name. Names are compared by
      their last component, without its suffix and without the class that the hub's ImageNet appends.
    ordered: whether `indices` is known. If not, the source has shuffled its examples, and a file that lists
      scores by example cannot be matched, unless this project estimated them for the same data.

  Returns:
    [N] float64 scores.

  Raises:
    UserError: if the file is missing, corrupt or made for another dataset, lacks the scores or
      some of the examples, or holds anything but numbers and names.

  Source: pluskid.github.io/influence-memorization publishes such files.
  """
  field = f"config.data.scores={path!r}"
  file = pathlib.Path(path)
  if not path or not file.is_file():
    raise UserError(
      f"{field}: no such file; give an .npz or .npy of one memorization score a training example,"
      " published or estimated by this project"
    )
  scores, arrays = _checked(file, field)
  if NAMES_KEY in arrays:
    scores = _by_name(scores, arrays[NAMES_KEY], names, field)
  elif ROWS_KEY in arrays:
    scores = _by_key(scores, np.asarray(arrays[ROWS_KEY]).tolist(), indices.tolist(), "example", field)
  elif not ordered:
    raise UserError(
      f"{field}: lists its scores by example, but this source has shuffled its examples and does not number"
      " them; take the dataset from another source, or set config.data.scores='estimate'"
    )
  elif len(scores) == total:
    scores = scores[indices]
  else:
    raise UserError(
      f"{field}: {len(scores)} scores for {total} training examples; it was made for another dataset, so"
      " give the file of this one"
    )
  unknown = np.flatnonzero(~np.isfinite(scores))
  if len(unknown):
    raise UserError(
      f"{field}: {len(unknown)} of {len(scores)} training examples have no finite score, first example"
      f" {indices[unknown[0]]}; give a file with all scores"
    )
  return scores.astype(np.float64)


def _checked(file: pathlib.Path, field: str) -> tuple[np.ndarray, dict[str, np.ndarray | list[str]]]:
  """Reads the scores and the arrays that belong to them, each with one value per score."""
  if file.suffix not in SUFFIXES:
    raise UserError(f"{field}: choose a file of type {', '.join(SUFFIXES)}")
  with outside.read_of(field, "scores", "download or estimate them again"):
    key, arrays = _read(file)
  scores = arrays[key]
  if scores.ndim != 1 or scores.dtype.kind not in "fiu":
    raise UserError(
      f"{field}: needs one number per example, but {key} is {scores.dtype} of shape {scores.shape}"
    )
  for key in {NAMES_KEY, ROWS_KEY} & arrays.keys():
    if len(arrays[key]) != len(scores):
      raise UserError(f"{field}: holds {len(scores)} scores, but {len(arrays[key])} {key}")
  return scores, arrays


def _by_name(scores, score_names, names, field: str) -> np.ndarray:
  """Aligns scores that are listed by file name."""
  if names is None:
    raise UserError(
      f"{field}: lists its scores by file name, which this dataset does not have; use the hub's"
      " or TFDS's ImageNet"
    )
  wanted = [_stem(name) for name in names]
  return _by_key(scores, map(_stem, score_names), wanted, "image", field)


def _by_key(scores, keys, wanted: list, what: str, field: str) -> np.ndarray:
  """Aligns scores by the key of the example that each belongs to."""
  place = {key: index for index, key in enumerate(keys)}
  if len(place) < len(scores) or len(set(wanted)) < len(wanted):
    raise UserError(
      f"{field}: some {what} is listed twice, so its score is ambiguous; list every {what} once"
    )
  missing = [key for key in wanted if key not in place]
  if missing:
    raise UserError(
      f"{field}: no score for {len(missing)} of {len(wanted)} training examples, such as {what}"
      f" {missing[0]}; it was made for another dataset, so give the file of this one"
    )
  return scores[[place[key] for key in wanted]]


def _stem(name: str) -> str:
  """Returns n01440764_10026 for "train/n01440764_10026.JPEG" and for "n01440764_10026_n01440764.JPEG"."""
  stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
  return stem.removesuffix("_" + stem.split("_", 1)[0])


def _read(file: pathlib.Path) -> tuple[str, dict[str, Any]]:
  """Reads the scores and the arrays that belong to them, names as a list -> (key of the scores, arrays)."""
  arrays: dict[str, Any] = outside.arrays_of(file, {"", *SCORE_KEYS, ROWS_KEY})
  if "" in arrays:
    return SCORE_KEYS[0], {SCORE_KEYS[0]: arrays[""]}
  with zipfile.ZipFile(file) as archive:
    held = [member.removesuffix(".npy") for member in archive.namelist()]
    found = [key for key in SCORE_KEYS if key in arrays]
    if not found:
      raise ValueError(f"it holds {', '.join(held) or 'nothing'}; needs one of {', '.join(SCORE_KEYS)}")
    if NAMES_KEY in held:
      with archive.open(f"{NAMES_KEY}.npy") as member:
        arrays[NAMES_KEY] = _read_names(member)
  return found[0], arrays


def _read_names(member) -> list[str]:
  """Reads a vector of names: bytes, strings, or pickled Python objects that are bytes or strings."""
  header = np.lib.format.read_array_header_1_0
  if np.lib.format.read_magic(member) != (1, 0):
    header = np.lib.format.read_array_header_2_0
  if header(member)[2].hasobject:
    try:
      values = _Unpickler(member).load().state[4]
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
      raise ValueError(f"its {NAMES_KEY} are not a pickled array: {first_line(error)}") from None
  else:
    member.seek(0)
    values = np.lib.format.read_array(member, allow_pickle=False).tolist()
  if not isinstance(values, list):
    raise ValueError(f"its {NAMES_KEY} are not a vector")
  return [_text(value) for value in values]


class _Recorded:
  """A call that a pickle asks for: it is recorded, but never made."""

  def __init__(self, *arguments):
    self.arguments = arguments

  def __setstate__(self, state):
    self.state = state


class _Encoded(_Recorded):
  """`codecs.encode(text, "latin1")`, which is how protocol 2 writes bytes."""


class _Unpickler(pickle.Unpickler):
  """Reads a pickled array of objects into lists, bytes, strings and numbers.

  The few names that such an array needs are replaced by `_Recorded`, so no function of NumPy is called
  with data of the file. Any other name is refused before it is looked up.
  """

  ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Recorded,
    ("numpy._core.multiarray", "_reconstruct"): _Recorded,
    ("numpy", "ndarray"): _Recorded,
    ("numpy", "dtype"): _Recorded,
    ("_codecs", "encode"): _Encoded,
  }

  def find_class(self, module: str, name: str) -> type[_Recorded]:
    if (module, name) not in self.ALLOWED:
      raise pickle.UnpicklingError(f"it asks for {module}.{name}, but may hold bytes, text and numbers only")
    return self.ALLOWED[module, name]


def _text(value) -> str:
  """Returns a name as text, whichever way it is stored."""
  if isinstance(value, _Encoded) and value.arguments[1:] == ("latin1",):
    value = value.arguments[0]
  if isinstance(value, bytes):
    value = value.decode()
  if not isinstance(value, str):
    raise ValueError(f"its {NAMES_KEY} hold a {type(value).__name__} where a name is needed")
  return value
