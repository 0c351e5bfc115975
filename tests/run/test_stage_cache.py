"""The stage cache: keyed by content, appearing whole, refusing damage."""

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
  np.testing.assert_array_equal(cache.model("pretrain", "k", LIKE)["params"]["w"], MODEL["params"]["w"])
  assert cache.outcome("pretrain", "other") is None
  assert [path.name for path in (tmp_path / "deep" / "cache").iterdir()] == ["pretrain-k"]


def test_the_first_of_two_equal_runs_stays(tmp_path):
  cache = stages.StageCache(tmp_path)
  cache.publish("evaluate", "k", {"from": "first"})
  cache.publish("evaluate", "k", {"from": "second"})
  assert cache.outcome("evaluate", "k") == {"from": "first"}
  assert len(list(tmp_path.iterdir())) == 1


def test_an_unfinished_stage_is_not_found(tmp_path, monkeypatch):
  cache = stages.StageCache(tmp_path)

  def killed(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(stages.checkpoints, "save_tree", killed)
  with pytest.raises(KeyboardInterrupt):
    cache.publish("pretrain", "k", {}, MODEL)
  assert cache.outcome("pretrain", "k") is None


def test_damage_is_named_with_its_remedy(tmp_path):
  cache = stages.StageCache(tmp_path)
  cache.publish("pretrain", "k", {"steps": 3}, MODEL)
  (tmp_path / "pretrain-k" / "outcome.json").write_text("{")
  with pytest.raises(UserError, match="outcome.json: the cached stage is damaged.*delete"):
    cache.outcome("pretrain", "k")


def test_a_model_of_another_shape_is_refused(tmp_path):
  cache = stages.StageCache(tmp_path)
  cache.publish("pretrain", "k", {}, MODEL)
  other = jax.eval_shape(lambda: {"params": {"w": jnp.zeros((5, 3))}, "batch_stats": {}})
  with pytest.raises(UserError, match="damaged or of another model"):
    cache.model("pretrain", "k", other)


def test_a_model_may_be_read_on_other_devices(tmp_path):
  cache = stages.StageCache(tmp_path)
  mesh = pairing.make_mesh(jax.devices(), 2)
  cache.publish("pretrain", "k", {}, loop.place(MODEL, mesh))
  model = loop.place(cache.model("pretrain", "k", LIKE), None)
  assert len(model["params"]["w"].sharding.device_set) == 1
  np.testing.assert_array_equal(model["params"]["w"], MODEL["params"]["w"])


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
  def full(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(stages.checkpoints, "save_tree", full)
  with pytest.raises(UserError, match="config.stage_cache.*No space left"):
    stages.StageCache(tmp_path).publish("pretrain", "k", {}, MODEL)
