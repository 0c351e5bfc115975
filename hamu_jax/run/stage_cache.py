"""The cache of finished stages, keyed by a fingerprint of everything they depend on.

A stage folder `<name>-<fingerprint>` is complete as soon as it exists, because it is renamed into place. So
several runs may share one cache. It holds `outcome.json`, for stages that produce a model an Orbax
checkpoint, and the digests of these files. A damaged folder is set aside, as if it had not been cached.
"""

import hashlib
import io
import json
import pathlib
import secrets
import shutil
import socket
import zlib
from collections.abc import Mapping
from typing import Any

from hamu_jax.errors import UserError, brief
from hamu_jax.run import checkpoints, digests, disk, hosts, lock

Tree = Any
_OUTCOME = "outcome.json"
_MODEL = "model"
_LOCK = ".lock"
_TRAINED = {"steps": int, "stop_reason": str, "seconds": float}
# The values of each stage that an experiment reads. Those without digests, of version 0.1.0, are checked.
_VALUES: dict[str, dict[str, type]] = {
  "pretrain": _TRAINED,
  "retrain": _TRAINED,
  "unlearn": _TRAINED,
  "memorization": {"correct": str, "seconds": float},
  "mask": {"masks": list, "seconds": float},
  "evaluate": {},
}
# Those of any other kind of evaluation.
_EVALUATED = {"values": dict, "examples": dict}


def fingerprint(inputs: Mapping[str, Any]) -> str:
  """The first 16 hexadecimal digits of the SHA-256 of JSON values."""
  text = json.dumps(inputs, sort_keys=True, default=list)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


class StageCache:
  """Looks up and publishes finished stages.

  Args:
    path: folder of the cache, created if it is missing.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._checked: set[pathlib.Path] = set()

  def folder(self, name: str, key: str) -> pathlib.Path:
    """The folder of a stage, whether it exists or not."""
    return self._path / f"{name}-{key}"

  def outcome(self, name: str, key: str) -> dict[str, Any] | None:
    """Reads the JSON values of a finished stage.

    Returns:
      The values; None if the stage is not cached, or if it was damaged and is now set aside.

    Raises:
      UserError: if the folder may not be read, or is damaged and cannot be renamed.
    """
    folder = self.folder(name, key)
    if not folder.exists():
      return None
    damage = None if folder in self._checked else digests.damage(folder, _label(name, key))
    if damage is None:
      try:
        outcome = json.loads((folder / _OUTCOME).read_bytes())
        damage = None if digests.has_digests(folder) else _wrong_value(name, outcome)
        if damage is None:
          self._checked.add(folder)
          return outcome
      except (OSError, ValueError, RecursionError) as error:
        damage = f"{_OUTCOME}: {brief(error)}"
    self._set_aside(folder, damage)
    return None

  def load(self, name: str, key: str, like: Tree) -> tuple[Tree, dict[str, Any]] | None:
    """Reads the model and the JSON values of a finished stage.

    Args:
      name: name of the stage.
      key: key of the stage.
      like: structure, shapes and dtypes of the model.

    Returns:
      (model, values); None if the stage is not cached, or if it was damaged and is now set aside.

    Raises:
      UserError: see `outcome`; or the model is another one.
    """
    outcome = self.outcome(name, key)
    if outcome is None:
      return None
    folder = self.folder(name, key)
    try:
      return checkpoints.load_tree(folder / _MODEL, like), outcome
    except UserError as error:
      if digests.has_digests(folder):
        raise
      # Version 0.1.0 wrote no digests, so that damage shows only now.
      self._set_aside(folder, str(error.__cause__ or error))
      return None

  def publish(self, name: str, key: str, outcome: Mapping[str, Any], model: Tree | None = None):
    """Adds a finished stage; if another run added it first, its equal result is kept.

    Raises:
      UserError: if the stage cannot be written; nothing of it is left then.
    """
    target = self.folder(name, key)
    # All processes of a run write the model into one folder, which no other run may use.
    number = int(hosts.agree(secrets.randbits(31)))
    host = int(hosts.agree(_host() if hosts.is_writer() else 0))
    temporary = self._path / f".{name}-{key}.{host:08x}.{number:08x}"
    with disk.writing(
      f"config.stage_cache: could not write {target}",
      "make room or choose another folder, then run the same command to resume",
    ):
      held = lock.try_lock(_lock_of(temporary)) if hosts.is_writer() else None
      try:
        if hosts.is_writer():
          temporary.mkdir()
        hosts.barrier(f"publish {name}")
        if model is not None:
          checkpoints.save_tree(temporary / _MODEL, model)
        if hosts.is_writer():
          (temporary / _OUTCOME).write_text(json.dumps(outcome, indent=2, sort_keys=True))
          digests.write(temporary, _label(name, key))
          try:
            temporary.rename(target)
          except OSError:
            if not target.exists():
              raise
      finally:
        # The folder is still there if something failed, or if another run was faster.
        if held is not None:
          _remove(temporary, held)
      hosts.barrier(f"published {name}")

  def clean(self) -> None:
    """Removes what processes of this machine that were killed while they published have left."""
    for path in self._path.glob(f".*.{_host():08x}.*{_LOCK}"):
      held = lock.try_lock(path)
      if held is not None:
        _remove(path.with_name(path.name.removesuffix(_LOCK)), held)

  def _set_aside(self, folder: pathlib.Path, damage: str) -> None:
    self._checked.discard(folder)
    digests.set_aside(folder, damage, "it is computed again")


def _label(name: str, key: str) -> dict[str, Any]:
  return {"stage": name, "key": key}


def _lock_of(temporary: pathlib.Path) -> pathlib.Path:
  """The file that is locked as long as the process that writes a temporary folder lives."""
  return temporary.with_name(f"{temporary.name}{_LOCK}")


def _remove(temporary: pathlib.Path, held: io.FileIO) -> None:
  """Removes a temporary folder, if it is there, and its lock."""
  shutil.rmtree(temporary, ignore_errors=True)
  _lock_of(temporary).unlink(missing_ok=True)
  held.close()


def _wrong_value(name: str, outcome: Any) -> str | None:
  """What is wrong with the values of a stage; None if nothing is."""
  if not isinstance(outcome, dict):
    return f"{_OUTCOME} holds no object"
  for field, kind in _VALUES.get(name, _EVALUATED).items():
    if not isinstance(outcome.get(field), (int, float) if kind is float else kind):
      return f"{_OUTCOME} has no {field}, or one of another type"
  return None


def _host() -> int:
  """A number for this machine."""
  return zlib.crc32(socket.gethostname().encode()) & 0x7FFFFFFF
