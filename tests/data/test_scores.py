"""Score files as they are published, their alignment to examples, and every refusal."""

import builtins
import io
import pickle
import zipfile

import numpy as np
import pytest

from hamu_jax.data import make_split, read_scores
from hamu_jax.errors import UserError

RNG = np.random.default_rng(0)
SCORES = RNG.uniform(-0.1, 1, 12)
NAMES = [f"n0144{index % 3}764_{index * 37}.JPEG" for index in range(12)]


def _save(path, **arrays):
  np.savez(path, **arrays)
  return str(path)


def _save_pickle(path, pickled, scores=SCORES, version=(1, 0), shape=None):
  """An .npz whose `tr_filenames` are an object array with this pickle, as np.savez writes it."""
  header = {"descr": "|O", "fortran_order": False, "shape": shape or (len(scores),)}
  names = io.BytesIO()
  write = {1: np.lib.format.write_array_header_1_0, 2: np.lib.format.write_array_header_2_0}
  write[version[0]](names, header)
  names.write(pickled)
  values = io.BytesIO()
  np.save(values, scores)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("tr_filenames.npy", names.getvalue())
    archive.writestr("tr_mem.npy", values.getvalue())
  return str(path)


def _refused(path, message, indices=np.arange(12), total=12, names=None):
  with pytest.raises(UserError, match=message) as error:
    read_scores(str(path), indices=indices, total=total, names=names)
  assert "\n" not in str(error.value)
  assert str(error.value).startswith("config.data.scores=")


@pytest.mark.parametrize("key", ["tr_mem", "memorization"])
def test_scores_are_indexed_by_the_original_row(tmp_path, key):
  matrices = {"infl_matrix_class0": np.ones((3, 3)), "tr_classidx_0": np.arange(3)}
  path = _save(tmp_path / "scores.npz", **{key: SCORES.astype(np.float32)}, **matrices)
  indices = np.array([7, 0, 11])
  result = read_scores(path, indices=indices, total=12)
  assert result.dtype == np.float64
  np.testing.assert_array_equal(result, SCORES.astype(np.float32)[indices])


def test_a_plain_vector_is_scores(tmp_path):
  np.save(tmp_path / "scores.npy", SCORES)
  result = read_scores(str(tmp_path / "scores.npy"), indices=np.arange(12), total=12)
  np.testing.assert_array_equal(result, SCORES)


def test_a_file_may_say_which_rows_its_scores_are_of(tmp_path):
  order = RNG.permutation(40)[:12]
  path = _save(tmp_path / "scores.npz", memorization=SCORES, rows=order)
  indices = order[[5, 2, 9]]
  np.testing.assert_array_equal(read_scores(path, indices=indices, total=40), SCORES[[5, 2, 9]])
  other = np.setdiff1d(np.arange(40), order)[:2]
  message = f"no score for 2 of 3 training examples, such as example {other[0]}"
  _refused(path, message, indices=np.append(other, order[0]), total=40)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("kind", ["bytes", "text"])
def test_names_in_object_arrays_are_read_whatever_the_protocol(tmp_path, protocol, kind):
  names = [name.encode() if kind == "bytes" else name for name in NAMES]
  pickled = pickle.dumps(np.array(names, object), protocol)
  # NumPy 1 wrote its module's name without the underscore.
  old = pickled.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
  order = RNG.permutation(12)
  # The hub's ImageNet appends the class, and a folder may stand before.
  wanted = [f"train/{NAMES[index][:-5]}_{NAMES[index][:9]}.JPEG" for index in order]
  for number, data in enumerate((pickled, old)):
    path = _save_pickle(tmp_path / f"{number}.npz", data)
    result = read_scores(path, indices=np.arange(12), total=99, names=wanted)
    np.testing.assert_array_equal(result, SCORES[order])


@pytest.mark.parametrize("names", [np.array(NAMES), np.array(NAMES, "S"), np.array(NAMES, object)])
def test_names_are_read_as_numpy_saves_them(tmp_path, names):
  path = _save(tmp_path / "index.npz", tr_mem=SCORES, tr_filenames=names, tt_filenames=names)
  kept = np.array([10, 3])
  wanted = np.array(NAMES, np.dtypes.StringDType())[kept]
  np.testing.assert_array_equal(read_scores(path, indices=kept, total=12, names=wanted), SCORES[kept])


def test_version_2_headers_are_read(tmp_path):
  pickled = pickle.dumps(np.array(NAMES, object), 3)
  path = _save_pickle(tmp_path / "index.npz", pickled, version=(2, 0))
  np.testing.assert_array_equal(read_scores(path, indices=np.arange(12), total=12, names=NAMES), SCORES)


@pytest.mark.parametrize("level", ["high", "mid", "low"])
def test_imagenet_forget_sets_are_the_reference_rows(tmp_path, golden, level):
  with np.load(golden / "sam" / "selection.npz") as data:
    scores = data["imagenet/tr_mem"]
    file_ids, dataset_ids = data["imagenet/score_file_id"], data["imagenet/dataset_id"]
    expected = data[f"imagenet/{level}"]
  names = np.array([f"n01440764_{name}.JPEG".encode() for name in file_ids], object)
  path = _save(tmp_path / "imagenet_index.npz", tr_mem=scores, tr_filenames=names)
  aligned = read_scores(
    path,
    indices=np.arange(500),
    total=500,
    names=[f"n01440764_{name}_n01440764.JPEG" for name in dataset_ids],
  )
  split = make_split(
    "memorization",
    np.zeros(500, int),
    seed=0,
    memorization_level=level,
    forget_size=40,
    scores=aligned,
  )
  # The reference lists them in the order of the dataset, we in that of the selection.
  np.testing.assert_array_equal(np.sort(split.forget), expected)


class _Malicious:
  """Pickles into a call; what it would do is seen in `builtins`."""

  def __init__(self, *call):
    self.call = call

  def __reduce__(self):
    return self.call[0], self.call[1:]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
  "call, message",
  [
    ((exec, "import builtins; builtins.pwned = True"), "asks for builtins.exec"),
    ((setattr, builtins, "pwned", True), "asks for builtins"),
    ((np.load, "scores.npz"), "asks for numpy"),
  ],
)
def test_a_malicious_object_array_is_refused_without_running(tmp_path, monkeypatch, call, message, inside):
  monkeypatch.delattr(builtins, "pwned", raising=False)
  if call[0] is setattr:
    call = (setattr, _Malicious(__import__, "builtins"), *call[2:])
  value = _Malicious(*call)
  pickled = pickle.dumps(np.array([*NAMES[:11], value], object) if inside else value, 4)
  path = _save_pickle(tmp_path / "index.npz", pickled)
  _refused(path, f"cannot be read as scores .*{message}.*bytes, text and numbers", names=NAMES)
  assert not hasattr(builtins, "pwned")
  # The same file does run code where pickles are allowed.
  if call[0] is exec:
    with np.load(path, allow_pickle=True) as archive:
      archive["tr_filenames"]
    assert builtins.pwned
    del builtins.pwned


@pytest.mark.parametrize(
  "pickled, message",
  [
    (b"", "cannot be read as scores"),
    (b"\x80\x04no pickle", "cannot be read as scores"),
    (pickle.dumps(NAMES, 4), "tr_filenames are not a pickled array"),
    (pickle.dumps(np.array(NAMES), 4), "tr_filenames are not a vector"),
    (pickle.dumps(np.array(NAMES, object), 4)[:-40], "cannot be read as scores"),
    (pickle.dumps(np.array([*NAMES[:11], {}], object), 4), "hold a dict where a name"),
    (pickle.dumps(np.array([*NAMES[:11], b"\xff"], object), 4), "cannot be read as scores"),
    (pickle.dumps(np.array(NAMES[:5], object), 4), "12 scores, but 5 tr_filenames"),
    # bytes of a length that no memory holds
    (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f", "cannot be read as scores"),
    # `find_class` results may not be changed either: BUILD on one of them.
    (b"\x80\x02cnumpy\nndarray\n}X\x01\x00\x00\x00aK\x01sb.", "tr_filenames are not a pickled"),
  ],
)
def test_damaged_pickles_are_refused(tmp_path, pickled, message):
  _refused(_save_pickle(tmp_path / "index.npz", pickled), message, names=NAMES)


def test_files_for_other_data_are_refused(tmp_path):
  _refused(tmp_path / "missing.npz", "no such file; give an .npz or .npy")
  _refused("", "no such file")
  (tmp_path / "scores.csv").write_text("0.5")
  _refused(tmp_path / "scores.csv", "choose a file of type .npz, .npy")
  path = _save(tmp_path / "key.npz", scores=SCORES, labels=SCORES)
  _refused(path, "it holds scores, labels; needs one of tr_mem, memorization")
  path = _save(tmp_path / "length.npz", tr_mem=SCORES)
  _refused(path, "12 scores for 50000 training examples; it was made for another", total=50000)
  path = _save(tmp_path / "nan.npz", tr_mem=np.where(np.arange(12) % 5 == 3, np.nan, SCORES))
  _refused(path, "2 of 12 training examples have no finite score, first example 3")
  path = _save(tmp_path / "matrix.npz", tr_mem=SCORES[:, None])
  _refused(path, r"one number per example, but tr_mem is float64 of shape \(12, 1\)")
  path = _save(tmp_path / "text.npz", tr_mem=np.array(NAMES))
  _refused(path, "one number per example, but tr_mem is <U")
  path = _save(tmp_path / "objects.npz", tr_mem=SCORES.astype(object))
  _refused(path, "Object arrays cannot be loaded")
  (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no archive")
  _refused(tmp_path / "broken.npz", "cannot be read as scores")
  (tmp_path / "empty.npy").write_bytes(b"")
  _refused(tmp_path / "empty.npy", "cannot be read as scores")


def test_names_that_do_not_tell_rows_apart_are_refused(tmp_path):
  path = _save(tmp_path / "index.npz", tr_mem=SCORES, tr_filenames=np.array(NAMES))
  _refused(path, "lists its scores by file name, which this dataset does not have")
  names = [*NAMES[:11], "other.png"]
  _refused(path, "no score for 1 of 12 .* such as image other; it", names=names)
  _refused(path, "some image is listed twice", names=[*NAMES[:11], NAMES[0]])
  doubled = np.array([*NAMES[:11], NAMES[0]])
  path = _save(tmp_path / "doubled.npz", tr_mem=SCORES, tr_filenames=doubled)
  _refused(path, "some image is listed twice", names=NAMES)
