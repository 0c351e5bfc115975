"""Checkpoints through Orbax: the only module that knows their format on disk."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hamu_jax.errors import UserError

Tree = Any
_KEEP = 2


class Checkpoints:
  """The checkpoints of one stage in progress.

  A checkpoint gets its final name only when it is complete, so if a process is killed while it writes, the
  previous checkpoint is still there.

  Args:
    path: folder of the stage's checkpoints.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._manager = ocp.CheckpointManager(
      path.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=_KEEP,
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
      ),
    )

  @property
  def latest(self) -> int | None:
    """Step of the newest checkpoint, None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, tree: Tree, meta: dict[str, Any]) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
      step: number of steps of the stage that are done.
      tree: pytree of arrays.
      meta: JSON values.

    Raises:
      UserError: if the checkpoint cannot be written.
    """
    if self.latest == step:
      return
    try:
      self._manager.save(
        step, args=ocp.args.Composite(tree=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))
      )
    except OSError as error:
      raise UserError(
        f"{self._path}: could not write the checkpoint of step {step} ({error.strerror or error}); "
        "make room or choose another --workdir, then run the same command to resume from the last one"
      ) from error

  def restore(self, like: Tree) -> tuple[Tree, dict[str, Any]]:
    """Reads the newest checkpoint.

    Args:
      like: pytree with the expected structure, shapes and dtypes.

    Returns:
      (tree, meta) as passed to `save`.

    Raises:
      UserError: if the checkpoint cannot be read, or is of another model.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
      restored = self._manager.restore(
        self.latest,
        args=ocp.args.Composite(tree=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()),
      )
    except Exception as error:  # Orbax and tensorstore raise many types for a damaged folder.
      remedy = "delete that folder to resume from the one before, or choose another --workdir"
      raise _unreadable(self._path / str(self.latest), error, remedy) from error
    return restored["tree"], restored["meta"]

  def close(self) -> None:
    """Releases Orbax's threads."""
    self._manager.close()


def _unreadable(path: pathlib.Path, error: Exception, remedy: str) -> UserError:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return UserError(
    f"{path}: this checkpoint cannot be read ({lines[0][:200]}); it is damaged or of another model: {remedy}"
  )


def _check_same(wanted, found) -> None:
  if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
    raise ValueError(f"{found.dtype}{list(found.shape)} where {wanted.dtype}{list(wanted.shape)} is needed")


def save_tree(path: pathlib.Path, tree: Tree) -> None:
  """Writes one pytree of arrays as an Orbax checkpoint at `path`."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path.absolute(), tree)


def load_tree(path: pathlib.Path, like: Tree) -> Tree:
  """Reads a checkpoint of `save_tree`, written on any devices, into this process's memory.

  Args:
    path: path of the checkpoint.
    like: pytree with the expected structure, shapes and dtypes.

  Returns:
    The tree, as NumPy arrays.

  Raises:
    UserError: if the checkpoint is missing, damaged or of another model.
  """
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      restored = checkpointer.restore(
        path.absolute(),
        args=ocp.args.PyTreeRestore(
          item=like,
          # Arrays are restored as NumPy, because the devices may differ from those that wrote them.
          restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like),
        ),
      )
    jax.tree.map(_check_same, like, restored)
    return restored
  except Exception as error:  # Orbax and tensorstore raise many types for a damaged folder.
    raise _unreadable(path, error, "delete its stage folder to compute it again") from error
