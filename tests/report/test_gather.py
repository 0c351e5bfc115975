"""Which made-up run directories are found, and which of them are on the same data."""

import shutil

import pytest

from hamu_jax.errors import UserError
from hamu_jax.report import gather
from tests.report import directories


def test_nowhere_and_nothing_are_one_line(tmp_path):
  with pytest.raises(UserError, match="missing: no such folder"):
    gather.gather([tmp_path / "missing"])
  with pytest.raises(UserError, match="no run directory there"):
    gather.gather([tmp_path])


def test_each_dataset_is_a_study_of_its_own(tmp_path):
  directories.write(tmp_path / "a")
  directories.write(tmp_path / "b", data="e" * 64)
  runs = gather.gather([tmp_path]).runs
  assert [study.label for study in gather.studies(runs)] == [
    "digits, data dddddddd",
    "digits, data eeeeeeee",
  ]
  shutil.rmtree(tmp_path / "b")
  directories.write(tmp_path / "c", data="e" * 64, data__source="tfds", data__name="cifar10")
  runs = gather.gather([tmp_path]).runs
  assert [study.label for study in gather.studies(runs)] == ["digits", "tfds, cifar10"]


def test_the_same_contents_from_another_source_are_the_same_data(tmp_path):
  directories.write(tmp_path / "a", seed=1, data__source="parquet", data__path="here")
  directories.write(tmp_path / "b", seed=2, data__source="tfds", data__name="cifar10")
  (group,) = directories.study(tmp_path).groups
  assert len(group.runs) == 2


def test_seeds_of_a_subset_are_one_dataset(tmp_path):
  for seed in (1, 2):
    directories.write(
      tmp_path / str(seed), seed=seed, data__seed=seed, data__train_size=500, data=str(seed) * 64
    )
  (group,) = directories.study(tmp_path).groups
  assert len(group.runs) == 2


def test_other_texts_to_forget_of_one_source_are_one_dataset(tmp_path):
  for split in ("forget05", "forget10"):
    directories.write(
      tmp_path / split,
      model__name="llama",
      data__source="tofu",
      text__forget_split=split,
      data=split.ljust(64),
    )
  study = directories.study(tmp_path)
  assert study.task_fields == ("text.forget_split",)


def test_an_unfinished_run_joins_the_data_of_its_section(tmp_path):
  directories.write(tmp_path / "a")
  directories.write(tmp_path / "b", data="e" * 64, data__path="elsewhere")
  directories.write(tmp_path / "c", finished=False, data__path="elsewhere")
  by_label = gather.datasets(gather.gather([tmp_path]).runs)
  assert [[run.path.name for run in runs] for runs in by_label.values()] == [["a"], ["b", "c"]]
