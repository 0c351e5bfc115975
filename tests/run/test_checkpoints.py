"""Checkpoints of a stage in progress: round trip, rotation, damage."""

import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.errors import UserError
from hamu_jax.run import checkpoints


def tree(value):
  return {"w": jnp.full((3,), value), "count": jnp.asarray(int(value), jnp.int32), "empty": {}}


def test_the_newest_is_restored_and_old_ones_go(tmp_path):
  manager = checkpoints.Checkpoints(tmp_path / "stage")
  assert manager.latest is None
  for step in (1, 2, 3):
    manager.save(step, tree(step), {"seconds": step / 2})
  manager.close()
  manager = checkpoints.Checkpoints(tmp_path / "stage")
  restored, meta = manager.restore(tree(0))
  np.testing.assert_array_equal(restored["w"], [3, 3, 3])
  assert restored["count"] == 3
  assert meta == {"seconds": 1.5}
  assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["2", "3"]
  manager.close()


def test_saving_a_step_twice_keeps_the_first(tmp_path):
  manager = checkpoints.Checkpoints(tmp_path / "stage")
  manager.save(5, tree(5), {})
  manager.save(5, tree(6), {})
  np.testing.assert_array_equal(manager.restore(tree(0))[0]["w"], [5, 5, 5])
  manager.close()


def test_damage_and_other_models_are_named(tmp_path):
  manager = checkpoints.Checkpoints(tmp_path / "stage")
  manager.save(7, tree(7), {})
  with pytest.raises(UserError, match=r"stage/7: this checkpoint cannot be read"):
    manager.restore(tree(0) | {"w": jnp.zeros((4,))})
  for file in (tmp_path / "stage" / "7").rglob("*"):
    if file.is_file():
      file.write_bytes(b"?")
  with pytest.raises(UserError, match=r"stage/7: this checkpoint cannot be read.*delete"):
    manager.restore(tree(0))
  manager.close()


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
  manager = checkpoints.Checkpoints(tmp_path / "stage")

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(manager._manager, "save", full)
  with pytest.raises(UserError, match="could not write the checkpoint of step 1.*No space left"):
    manager.save(1, tree(1), {})
