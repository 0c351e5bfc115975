"""Checkpoints of a stage in progress: round trip, rotation, damage."""

import shutil

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


@pytest.fixture
def three(tmp_path):
  """The folder of a stage with the checkpoints of steps 2 and 3, the older ones gone."""
  manager = checkpoints.Checkpoints(tmp_path / "stage")
  for step in (1, 2, 3):
    manager.save(step, tree(step), {"step": step})
  manager.close()
  return tmp_path / "stage"


def restored_step(path):
  manager = checkpoints.Checkpoints(path)
  found = manager.restore(tree(0))
  manager.close()
  return found and found[1]["step"]


def test_another_model_is_named(three):
  manager = checkpoints.Checkpoints(three)
  with pytest.raises(UserError, match=r"stage/3: this checkpoint is of another model"):
    manager.restore(tree(0) | {"w": jnp.zeros((4,))})
  manager.close()


def test_every_flipped_bit_leads_to_the_checkpoint_before(three, capsys):
  rng = np.random.default_rng(0)
  files = sorted(path.relative_to(three) for path in (three / "3").rglob("*") if path.is_file())
  for file in files:
    content = bytearray((three / file).read_bytes())
    if not content:
      continue
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    whole, _ = (three / file).read_bytes(), (three / file).write_bytes(bytes(content))
    assert restored_step(three) == 2, file
    assert "stage/3 is damaged" in capsys.readouterr().err
    (three / "3.damaged-1").rename(three / "3")
    (three / file).write_bytes(whole)
  assert restored_step(three) == 3


def test_without_a_good_checkpoint_the_stage_starts_over(three, capsys):
  shutil.copy(three / "2" / "meta" / "metadata", three / "3" / "meta" / "metadata")
  # A checkpoint without digests: its writer was killed before it wrote them, or was of an older version.
  (three / "2" / "digests.json").unlink()
  (three / "2" / "tree" / "manifest.ocdbt").write_bytes(b"?")
  assert restored_step(three) is None
  notes = capsys.readouterr().err.splitlines()
  assert [note.split(" is damaged")[0][-7:] for note in notes] == ["stage/3", "stage/2"]
  manager = checkpoints.Checkpoints(three)
  manager.save(3, tree(3), {"step": 3})
  manager.close()
  assert restored_step(three) == 3
  assert (three / "3.damaged-1").exists() and (three / "2.damaged-1").exists()


def test_a_checkpoint_without_digests_is_taken(three):
  (three / "3" / "digests.json").unlink()
  assert restored_step(three) == 3


def test_a_checkpoint_of_another_stage_is_noticed(three, tmp_path):
  shutil.rmtree(three / "3")
  shutil.copytree(three / "2", three / "3")
  assert restored_step(three) == 2


@pytest.mark.parametrize(
  "error", [OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: No space left on device")]
)
def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch, error):
  manager = checkpoints.Checkpoints(tmp_path / "stage")

  def full(*args, **kwargs):
    (tmp_path / "stage" / "1.orbax-checkpoint-tmp").mkdir()
    raise error

  monkeypatch.setattr(manager._manager, "save", full)
  with pytest.raises(UserError, match=r"could not write the checkpoint of step 1 \(No space left"):
    manager.save(1, tree(1), {})
  assert not list((tmp_path / "stage").iterdir())
