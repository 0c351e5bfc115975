"""The cache of finished stages, keyed by a fingerprint of everything they depend on.

A stage folder `<name>-<fingerprint>` is complete as soon as it exists, because it is renamed into place. So
several runs may share one cache. It holds `outcome.json` and, for stages that produce a model, an Orbax
checkpoint.
"""

import hashlib
import json
import pathlib
import secrets
import shutil
from collections.abc import Mapping
from typing import Any

from hamu_jax.errors import UserError
from hamu_jax.run import checkpoints, hosts

Tree = Any
_OUTCOME = "outcome.json"
_MODEL = "model"


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

  def folder(self, name: str, key: str) -> pathlib.Path:
    """The folder of a stage, whether it exists or not."""
    return self._path / f"{name}-{key}"

  def outcome(self, name: str, key: str) -> dict[str, Any] | None:
    """Reads the JSON values of a finished stage; None if the stage is not cached.

    Raises:
      UserError: if the folder exists but is damaged.
    """
    path = self.folder(name, key) / _OUTCOME
    if not path.parent.exists():
      return None
    try:
      return json.loads(path.read_text())
    except (OSError, ValueError) as error:
      raise UserError(
        f"{path}: the cached stage is damaged ({error}); delete {path.parent} to compute it again"
      ) from error

  def model(self, name: str, key: str, like: Tree) -> Tree:
    """Reads the model of a finished stage; `like` has its structure, shapes and dtypes."""
    return checkpoints.load_tree(self.folder(name, key) / _MODEL, like)

  def publish(self, name: str, key: str, outcome: Mapping[str, Any], model: Tree | None = None):
    """Adds a finished stage; if another run added it first, its equal result is kept."""
    target = self.folder(name, key)
    # All processes of a run write the model into one folder, which no other run may use.
    temporary = self._path / f".{name}-{key}.{int(hosts.agree(secrets.randbits(31)))}"
    try:
      if hosts.is_writer():
        temporary.mkdir(parents=True)
      hosts.barrier(f"publish {name}")
      if model is not None:
        checkpoints.save_tree(temporary / _MODEL, model)
      if hosts.is_writer():
        (temporary / _OUTCOME).write_text(json.dumps(outcome, indent=2, sort_keys=True))
        try:
          temporary.rename(target)
        except OSError:
          if not target.exists():
            raise
          shutil.rmtree(temporary)
      hosts.barrier(f"published {name}")
    except OSError as error:
      raise UserError(
        f"config.stage_cache: could not write {target} ({error.strerror or error}); make room or choose "
        "another folder, then run the same command to resume"
      ) from error
