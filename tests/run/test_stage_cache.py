"""The stage cache: keyed by content, appearing whole, noticing damage."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.engine import loop, pairing
from hamu_jax.errors import UserError
from hamu_jax.run import stage_cache as stages

MODEL = {"params": {"w": jnp.arange(6.0).reshape(2, 3)}, "batch_stats": {}}
LIKE = jax.eval_shape(lambda: MODEL)


def test_fingerprint_depends_on_values_not_on_order():
  assert stages.fingerprint({"a": 1, "b": [2, 3]}) == stages.fingerprint({"b": (2, 3), "a": 1})
  assert stages.fingerprint({"a": 1}) != stages.fingerprint({"a": 2})


def test_what_is_published_is_found(tmp_path):
  cache = stages.StageCache(tmp_path / "deep" / "cache")
  assert cache.outcome("pretrain", "k") is None
  cache.publish("pretrain", "k", {"steps": 3}, MODEL)
  assert cache.outcome("pretrain", "k") == {"steps": 3}
  np.testing.assert_array_equal(cache.load("pretrain", "k", LIKE)[0]["params"]["w"], MODEL["params"]["w"])
  assert cache.outcome("pretrain", "other") is None
  assert [path.name for path in (tmp_path / "deep" / "cache").iterdir()] == ["pretrain-k"]


def test_the_first_of_two_equal_runs_stays(tmp_path):
  cache = stages.StageCache(tmp_path)
  cache.publish("evaluate", "k", {"from": "first"})
  cache.publish("evaluate", "k", {"from": "second"})
  assert cache.outcome("evaluate", "k") == {"from": "first"}
  assert len(list(tmp_path.iterdir())) == 1


def hidden(path):
  return [each.name for each in path.iterdir() if each.name.startswith(".")]


def test_a_stage_that_could_not_be_published_leaves_nothing(tmp_path, monkeypatch):
  cache = stages.StageCache(tmp_path)

  def killed(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(stages.checkpoints, "save_tree", killed)
  with pytest.raises(KeyboardInterrupt):
    cache.publish("pretrain", "k", {}, MODEL)
  assert cache.outcome("pretrain", "k") is None
  assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_but_not_what_a_live_one_writes(tmp_path, monkeypatch):
  cache = stages.StageCache(tmp_path)
  save = stages.checkpoints.save_tree

  def look(path, tree):
    save(path, tree)
    (there,) = tmp_path.glob(".pretrain-k.*[0-9a-f]")
    dead = tmp_path / f"{there.name[:-8]}00000000"
    dead.mkdir()
    (dead / "model").write_text("half")
    dead.with_name(f"{dead.name}.lock").write_text("process 7 on here")
    stages.StageCache(tmp_path).clean()
    assert there.exists() and not dead.exists()

  monkeypatch.setattr(stages.checkpoints, "save_tree", look)
  cache.publish("pretrain", "k", {"steps": 1}, MODEL)
  assert cache.outcome("pretrain", "k") == {"steps": 1}
  assert not hidden(tmp_path)


def flipped(folder):
  """Yields each file of a folder with one bit of it flipped, and repairs it afterwards."""
  rng = np.random.default_rng(0)
  for file in sorted(path for path in folder.rglob("*") if path.is_file()):
    whole = file.read_bytes()
    if whole:
      content = bytearray(whole)
      content[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
      file.write_bytes(bytes(content))
      yield file
      if file.exists():
        file.write_bytes(whole)


@pytest.fixture
def published(tmp_path):
  stages.StageCache(tmp_path).publish("pretrain", "k", {"steps": 3}, MODEL)
  return tmp_path / "pretrain-k"


def test_every_flipped_bit_is_noticed(published, tmp_path, capsys):
  count = 0
  for file in flipped(published):
    assert stages.StageCache(tmp_path).outcome("pretrain", "k") is None, file
    count += 1
    (aside,) = tmp_path.glob("*.damaged-1")
    assert "pretrain-k is damaged (" in capsys.readouterr().err
    aside.rename(published)
  assert count >= 10
  assert stages.StageCache(tmp_path).load("pretrain", "k", LIKE)[1] == {"steps": 3}


def test_a_damaged_stage_is_kept_under_another_name_and_published_again(published, tmp_path, capsys):
  for number in (1, 2):
    (published / "outcome.json").write_text('{"steps": 4}')
    cache = stages.StageCache(tmp_path)
    assert cache.outcome("pretrain", "k") is None
    (note,) = capsys.readouterr().err.splitlines()
    assert f"kept as pretrain-k.damaged-{number}; it is computed again" in note and "outcome.json" in note
    cache.publish("pretrain", "k", {"steps": 3}, MODEL)
    assert cache.outcome("pretrain", "k") == {"steps": 3}
  assert (tmp_path / "pretrain-k.damaged-2" / "outcome.json").read_text() == '{"steps": 4}'


def test_another_stage_under_this_name_is_noticed(published, tmp_path):
  shutil.copytree(published, tmp_path / "retrain-k")
  shutil.copytree(published, tmp_path / "pretrain-other")
  cache = stages.StageCache(tmp_path)
  assert cache.outcome("retrain", "k") is None
  assert cache.outcome("pretrain", "other") is None
  assert cache.outcome("pretrain", "k") == {"steps": 3}


def test_a_missing_file_is_noticed(published, tmp_path):
  (published / "model" / "_METADATA").unlink()
  assert stages.StageCache(tmp_path).outcome("pretrain", "k") is None


OLD = {"steps": 3, "seconds": 1.5, "stop_reason": "finished"}


@pytest.fixture
def old(tmp_path):
  """A stage as version 0.1.0 wrote it, without digests."""
  stages.StageCache(tmp_path).publish("pretrain", "k", OLD, MODEL)
  (tmp_path / "pretrain-k" / "digests.json").unlink()
  return tmp_path / "pretrain-k"


def test_a_stage_of_an_old_version_is_taken(old, tmp_path):
  model, outcome = stages.StageCache(tmp_path).load("pretrain", "k", LIKE)
  assert outcome == OLD
  np.testing.assert_array_equal(model["params"]["w"], MODEL["params"]["w"])


OF_ANOTHER_TYPE = json.dumps(OLD | {"steps": "x"})


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 10_000, "\0", "{}", OF_ANOTHER_TYPE], ids=len)
def test_a_broken_outcome_of_an_old_version_is_set_aside(old, tmp_path, text):
  (old / "outcome.json").write_text(text)
  assert stages.StageCache(tmp_path).outcome("pretrain", "k") is None
  assert (tmp_path / "pretrain-k.damaged-1").exists()


def test_a_broken_model_of_an_old_version_is_set_aside(old, tmp_path):
  for file in (old / "model").rglob("*"):
    if file.is_file():
      file.write_bytes(b"?")
  assert stages.StageCache(tmp_path).load("pretrain", "k", LIKE) is None
  assert (tmp_path / "pretrain-k.damaged-1").exists()


def test_a_model_of_another_shape_is_refused(tmp_path):
  cache = stages.StageCache(tmp_path)
  cache.publish("pretrain", "k", {}, MODEL)
  other = jax.eval_shape(lambda: {"params": {"w": jnp.zeros((5, 3))}, "batch_stats": {}})
  with pytest.raises(UserError, match="of another model"):
    cache.load("pretrain", "k", other)


def test_a_model_may_be_read_on_other_devices(tmp_path):
  cache = stages.StageCache(tmp_path)
  mesh = pairing.make_mesh(jax.devices(), 2)
  cache.publish("pretrain", "k", {}, loop.place(MODEL, mesh))
  model = loop.place(cache.load("pretrain", "k", LIKE)[0], None)
  assert len(model["params"]["w"].sharding.device_set) == 1
  np.testing.assert_array_equal(model["params"]["w"], MODEL["params"]["w"])


@pytest.mark.parametrize(
  "error",
  [
    OSError(28, "No space left on device"),
    ValueError("RESOURCE_EXHAUSTED: Error writing 'x': No space left on device [source locations='y']"),
  ],
)
def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch, error):
  def full(path, tree):
    path.mkdir()
    raise error

  monkeypatch.setattr(stages.checkpoints, "save_tree", full)
  with pytest.raises(UserError, match=r"config.stage_cache.*\(No space left on device\); make room"):
    stages.StageCache(tmp_path).publish("pretrain", "k", {}, MODEL)
  assert not list(tmp_path.iterdir())
