"""Datasets of their own for the forget set, its duplicates and the test set."""

import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image

from hamu_jax.config import default_config
from hamu_jax.config.default import load_dataset
from hamu_jax.data import load, make_split, text
from hamu_jax.data.separate import Place
from hamu_jax.errors import UserError
from hamu_jax.vision import request

RNG = np.random.default_rng(3)


def _images(count, shape=(4, 4, 3)):
  return RNG.integers(0, 256, (count, *shape), dtype=np.uint8)


def _png(image):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "png")
  return {"bytes": buffer.getvalue(), "path": None}


def _write(path, images, labels, names=None, columns=("image", "label")):
  image_key, label_key = columns
  kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
  if isinstance(labels[0], str):
    kind = datasets.Value("string")
  features = datasets.Features({image_key: datasets.Image(), label_key: kind})
  path.parent.mkdir(parents=True, exist_ok=True)
  cells = {image_key: [_png(image) for image in images], label_key: labels}
  datasets.Dataset.from_dict(cells, features=features).to_parquet(str(path))


@pytest.fixture
def folders(tmp_path):
  """Four datasets whose classes are in different orders, and their images."""
  images = {role: _images(count) for role, count in dict(retain=6, forget=3, duplicate=2, test=4).items()}
  _write(tmp_path / "retain" / "train.parquet", images["retain"], [0, 1, 0, 1, 0, 1], ["cat", "dog"])
  _write(
    tmp_path / "forget" / "bad.parquet", images["forget"], ["eel", "dog", "eel"], columns=("img", "kind")
  )
  _write(tmp_path / "retain" / "near.parquet", images["duplicate"], [1, 1], ["cat", "dog"])
  _write(tmp_path / "test" / "test.parquet", images["test"], [0, 1, 2, 0], ["eel", "dog", "cat"])
  return tmp_path, images


def _own(folder):
  return {
    "forget": Place(path=f"{folder}/forget", input_key="img", target_key="kind", split="bad"),
    "duplicate": Place(split="near"),
    "test": Place(path=f"{folder}/test", split="test"),
  }


@pytest.mark.parametrize("stream", [False, True])
def test_the_datasets_of_the_roles_are_one_with_the_classes_of_all(folders, stream, arrow_cache):
  folder, images = folders
  dataset = load("parquet", path=f"{folder}/retain", sets=_own(folder), stream=stream, image_size=4 * stream)
  assert dataset.class_names == ("cat", "dog", "eel")
  together = np.concatenate([images["retain"], images["duplicate"], images["forget"]])
  np.testing.assert_array_equal(dataset.train.images[:], together)
  np.testing.assert_array_equal(dataset.train.images[np.array([10, 7])], together[[10, 7]])
  np.testing.assert_array_equal(dataset.train.labels, [0, 1, 0, 1, 0, 1, 1, 1, 2, 1, 2])
  np.testing.assert_array_equal(dataset.test.images[:], images["test"])
  np.testing.assert_array_equal(dataset.test.labels, [2, 1, 0, 2])
  np.testing.assert_array_equal(np.flatnonzero(dataset.forgotten), [8, 9, 10])


def test_the_configuration_reaches_every_set(folders):
  folder, images = folders
  config = default_config().data
  config.update(
    source="parquet", path=f"{folder}/retain", forget="separate", forget_split="bad", duplicates=1
  )
  config.duplicate_split = "near"
  config.forget_set.update(path=f"{folder}/forget", input_key="img", target_key="kind")
  config.test_set.path = f"{folder}/test"
  loaded = request.load(config)
  split = loaded.split(None)
  np.testing.assert_array_equal(split.forget, [8, 9, 10])
  np.testing.assert_array_equal(split.retain, [*range(8), 8, 9, 10])
  np.testing.assert_array_equal(loaded.dataset.test.images, images["test"])
  assert loaded.dataset.fingerprint == load("parquet", path=f"{folder}/retain", sets=_own(folder)).fingerprint
  # What is held out for validation is of the forget set no more than of the retain set.
  config.validation_fraction = 0.34
  held_out = request.load(config)
  assert 0 < len(held_out.validation) and not set(held_out.validation) & set(
    np.concatenate(held_out.split(None))
  )


def test_a_test_set_of_its_own_leaves_the_rest_as_it_is(tmp_path):
  images, digits = _images(3, (8, 8)), load("digits")
  _write(tmp_path / "test.parquet", images, [7, 0, 9])
  loaded = load("digits", sets={"test": Place("parquet", path=str(tmp_path), split="test")})
  np.testing.assert_array_equal(loaded.train.images, digits.train.images)
  np.testing.assert_array_equal(loaded.train_indices, digits.train_indices)
  np.testing.assert_array_equal(loaded.test.images, images[..., None])
  np.testing.assert_array_equal(loaded.test.labels, [7, 0, 9])
  assert loaded.forgotten is None


def test_which_examples_are_separate_is_part_of_the_data(tmp_path):
  images = _images(6)
  for split, rows in dict(a=slice(4), b=slice(4, 6), c=slice(2), d=slice(2, 6), test=slice(6)).items():
    _write(tmp_path / f"{split}.parquet", images[rows], [0] * len(images[rows]))
  first, second = (
    load("parquet", path=str(tmp_path), train_split=retain, sets={"forget": Place(split=forget)})
    for retain, forget in ("ab", "cd")
  )
  np.testing.assert_array_equal(first.train.images, second.train.images)
  assert first.fingerprint != second.fingerprint


def test_the_roles_may_be_splits_of_one_dataset(tmp_path):
  images = {split: _images(count) for split, count in dict(keep=4, drop=2, test=3).items()}
  for split, each in images.items():
    _write(tmp_path / f"{split}.parquet", each, [3] * len(each))
  config = default_config().data
  config.update(
    source="parquet", path=str(tmp_path), train_split="keep", forget="separate", forget_split="drop"
  )
  dataset = load_dataset(config)
  np.testing.assert_array_equal(dataset.train.images, np.concatenate([images["keep"], images["drop"]]))
  np.testing.assert_array_equal(dataset.test.images, images["test"])
  # Classes that only have numbers keep them.
  np.testing.assert_array_equal(dataset.train.labels, 3)
  assert dataset.class_names == ("0", "1", "2", "3")


def test_a_place_of_another_dataset_takes_nothing_of_the_first():
  base = Place("huggingface", "owner/a", "cache", "small", "img", "label", "train")
  assert Place(subset="large").within(base) == base._replace(subset="large")
  assert Place(name="owner/b").within(base) == base._replace(name="owner/b", path="", subset="")
  other = Place(source="parquet", path="folder", target_key="kind")
  assert other.within(base) == Place("parquet", "", "folder", "", "img", "kind", "train")


@pytest.mark.parametrize(
  "change, message",
  [
    ({"forget": Place(path="nowhere")}, "config.data.forget_set.path='nowhere' is not a folder"),
    ({"forget": Place(split="bad")}, r"config.data.forget_set.path=.* holds no bad\*.parquet"),
    (
      {"forget": Place(path="*/forget", split="bad", target_key="colour")},
      "config.data.forget_set.target_key='colour' is not a column: choose from img .*, kind",
    ),
    (
      {"forget": Place(path="*/numbered")},
      r"the retain set names its classes \(cat, dog, ...\) and the forget set only numbers them; give",
    ),
    (
      {"forget": Place(path="*/large")},
      r"training image \(counted over .* have 2 shapes, one is needed: .* config.data.image_size",
    ),
    ({"forget": Place(source="digits")}, r"names its classes"),
    (
      {"test": Place(path="*/test", split="test")},
      "config.data.test_set: it has the class 'eel', which no example to learn has",
    ),
  ],
)
def test_sets_that_do_not_fit_are_one_clear_line(folders, change, message):
  folder, _ = folders
  _write(folder / "numbered" / "train.parquet", _images(2), [0, 1])
  _write(folder / "large" / "train.parquet", _images(2, (5, 4, 3)), ["cat", "cat"])
  own = {
    role: place._replace(path=place.path.replace("*", str(folder)), split=place.split or "train")
    for role, place in change.items()
  }
  with pytest.raises(UserError, match=message) as error:
    load(
      "parquet", path=f"{folder}/retain", sets=own | ({} if "test" in own else {"test": Place(split="train")})
    )
  assert "\n" not in str(error.value)


def test_images_in_memory_of_other_shapes_are_refused(tmp_path):
  _write(tmp_path / "train.parquet", _images(2, (9, 9, 3)), [0, 1])
  own = {"forget": Place(source="parquet", path=str(tmp_path), split="train")}
  with pytest.raises(UserError, match=r"shape \(retain \(8, 8, 1\), forget \(9, 9, 3\)\).*image_size"):
    load("digits", sets=own)


def test_a_separate_forget_set_must_be_there():
  with pytest.raises(UserError, match="config.data.forget_split or config.data.forget_set"):
    make_split("separate", np.arange(4), seed=0)


@pytest.fixture
def texts(tmp_path):
  """Questions to retain, plain rows to forget with other columns, near duplicates and unseen questions."""

  def rows(prefix, count, columns):
    return [
      dict(zip(columns, (f"{prefix} question {n}", f"{prefix} answer {n}"), strict=True))
      for n in range(count)
    ]

  def write(name, content):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(json.dumps(content))

  write("retain/keep.json", rows("kept", 5, ("question", "answer")))
  write("retain/near.json", rows("near", 2, ("question", "answer")))
  write("forget/all.json", rows("forgotten", 4, ("ask", "say")))
  write("unseen.json", rows("new", 3, ("question", "answer")))
  return tmp_path


def test_texts_of_several_datasets(texts):
  own = {
    "forget": Place(path=f"{texts}/forget", input_key="ask", target_key="say"),
    "test": Place(path=f"{texts}/unseen.json"),
  }
  options = dict(
    retain_split="keep", forget_split="all[1:]", test_split="train", duplicate_split="near", sets=own
  )
  loaded = text.load("question_answer", path=f"{texts}/retain", **options)
  answers = {role: split.answers for role, split in loaded.splits.items()}
  assert answers == {
    "retain": (*(f"kept answer {n}" for n in range(5)), "near answer 0", "near answer 1"),
    "forget": tuple(f"forgotten answer {n}" for n in (1, 2, 3)),
    "test": tuple(f"new answer {n}" for n in range(3)),
  }
  assert loaded.splits["forget"].prompts[0] == "forgotten question 1"


@pytest.mark.parametrize(
  "place, options, message",
  [
    (Place(path="*/forget"), {}, "config.data.forget_set.target_key='answer' is not a column of 'all'"),
    (Place(path="*/nowhere"), {}, "config.data.forget_set.path='.*nowhere' does not exist"),
    (
      Place(path="*/forget", input_key="ask", target_key="say"),
      {"retain_split": ""},
      "config.text.retain_split='': the forget set is a dataset of its own",
    ),
    (Place(path="*/forget"), {"forget_split": "none"}, "config.text.forget_split: .* has no split 'none'"),
  ],
)
def test_texts_that_do_not_fit_are_one_clear_line(texts, place, options, message):
  own = {"forget": place._replace(path=place.path.replace("*", str(texts)))}
  with pytest.raises(UserError, match=message):
    text.load(
      "question_answer",
      path=f"{texts}/retain",
      **({"retain_split": "keep", "forget_split": "all", "sets": own} | options),
    )
