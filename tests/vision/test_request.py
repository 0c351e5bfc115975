"""Which examples an experiment learns, forgets and holds out."""

import numpy as np
import pytest

from hamu_jax.config import default as config_lib
from hamu_jax.errors import UserError
from hamu_jax.vision import request as request_lib

ROWS = 1438


def load(**overrides):
  config = config_lib.default_config().data
  config.update(source="digits", mean=(0.5,), std=(0.5,), validation_fraction=0.1, **overrides)
  return request_lib.load(config)


def test_retain_forget_and_validation_share_out_the_rows():
  loaded = load(forget="random", forget_fraction=0.2)
  split = loaded.split(None)
  everything = np.concatenate([*split, loaded.validation])
  assert sorted(everything) == list(range(ROWS))
  labels = loaded.dataset.train.labels
  counts = np.bincount(labels[loaded.validation])
  np.testing.assert_array_equal(counts, np.round(0.1 * np.bincount(labels)))


def test_listed_rows_count_among_all_of_them(tmp_path):
  held_out = load().validation
  learnt = np.setdiff1d(np.arange(ROWS), held_out)
  np.save(tmp_path / "rows.npy", learnt[[5, 3]])
  loaded = load(forget="indices", forget_indices=str(tmp_path / "rows.npy"))
  split = loaded.split(None)
  assert split.forget.tolist() == learnt[[5, 3]].tolist()
  assert not np.isin(split.retain, held_out).any()
  np.save(tmp_path / "rows.npy", held_out[:2])
  with pytest.raises(
    UserError, match=rf"example {held_out[0]} is held out for validation \(2 such examples\)"
  ):
    loaded.split(None)


def test_scores_of_the_original_rows_reach_the_available_ones(tmp_path):
  scores = np.random.default_rng(0).uniform(size=ROWS)
  np.save(tmp_path / "scores.npy", scores)
  loaded = load(forget="memorization", scores=str(tmp_path / "scores.npy"), forget_size=7, train_size=500)
  own = loaded.read_scores()
  np.testing.assert_array_equal(own, scores[loaded.original_indices])
  forget = loaded.split(own).forget
  best = np.sort(scores[loaded.original_indices])[::-1][:7]
  np.testing.assert_array_equal(scores[loaded.dataset.train_indices[forget]], best)
  levels = loaded.levels(own)
  assert set(levels) == {"high", "mid", "low"}
  np.testing.assert_array_equal(levels["high"], forget)


def test_a_forget_set_that_scores_could_not_give_fails_before_they_are_estimated():
  loaded = load(forget="memorization", scores="estimate", forget_size=5000)
  assert loaded.read_scores() is None
  with pytest.raises(UserError, match="config.data.forget_size=5000"):
    loaded.split(None)


def test_a_mean_for_every_channel():
  config = config_lib.default_config().data
  config.source = "digits"
  with pytest.raises(UserError, match=r"config.data.mean=.*1 channel\(s\)"):
    request_lib.load(config)
