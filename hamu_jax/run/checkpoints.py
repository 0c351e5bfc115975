"""Checkpoints through Orbax: the only module that knows their format on disk."""

import concurrent.futures
import contextlib
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from hamu_jax.errors import UserError, brief
from hamu_jax.run import digests, disk, hosts

Tree = Any
_KEEP = 2
# Time in which threads of a failed write end.
_SECONDS_TO_END = 0.5


class Checkpoints:
  """The checkpoints of one stage in progress.

  A checkpoint gets its final name only when it is complete, so if a process is killed while it writes, the
  previous checkpoint is still there. Beside its files are their digests, by which damage is noticed.

  Args:
    path: folder of the stage's checkpoints.

  Raises:
    UserError: if the folder cannot be written.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    with disk.writing(path):
      self._manager = ocp.CheckpointManager(
        path.absolute(),
        options=ocp.CheckpointManagerOptions(
          max_to_keep=_KEEP,
          enable_async_checkpointing=False,
          cleanup_tmp_directories=True,
        ),
      )
    # Training goes on while the files of a checkpoint are hashed.
    self._hasher = concurrent.futures.ThreadPoolExecutor(1)
    self._hashing: concurrent.futures.Future[None] | None = None

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
    self._wait()
    if self.latest == step:
      return
    with self._writing(step), _one_report():
      try:
        self._manager.save(
          step, args=ocp.args.Composite(tree=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))
        )
      except BaseException:
        for partial in self._path.glob(f"{step}.orbax-checkpoint-tmp*"):
          shutil.rmtree(partial, ignore_errors=True)
        raise
    if hosts.is_writer():
      self._hashing = self._hasher.submit(digests.write, self._folder(step), self._label(step))

  def restore(self, like: Tree) -> tuple[Tree, dict[str, Any]] | None:
    """Reads the newest checkpoint that is not damaged; damaged ones are set aside.

    Args:
      like: pytree with the expected structure, shapes and dtypes.

    Returns:
      (tree, meta) as passed to `save`; None if there is no good checkpoint.

    Raises:
      UserError: if an undamaged checkpoint is of another model.
    """
    self._wait()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    wanted = ocp.args.Composite(tree=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
    while (step := self.latest) is not None:
      folder = self._folder(step)
      damage, restored = digests.damage(folder, self._label(step)), None
      if not hosts.agree(damage is not None):
        try:
          restored = self._manager.restore(step, args=wanted)
        except Exception as error:  # Orbax and tensorstore raise many types for a damaged folder.
          if digests.has_digests(folder):
            raise _unreadable(folder, error, "choose another --workdir") from error
          damage = brief(error)
      if not hosts.agree(restored is None):
        assert restored is not None
        return restored["tree"], restored["meta"]
      if hosts.is_writer():
        digests.set_aside(folder, damage or "another process cannot read it", "going on from the one before")
      hosts.barrier(f"set aside {folder}")
      self._manager.reload()
    return None

  def close(self) -> None:
    """Waits for the digests and releases Orbax's threads."""
    try:
      self._wait()
    finally:
      self._hasher.shutdown()
      self._manager.close()

  def _folder(self, step: int) -> pathlib.Path:
    return self._path / str(step)

  def _label(self, step: int) -> dict[str, Any]:
    return {"stage": self._path.name, "step": step}

  def _wait(self) -> None:
    """Waits until the newest checkpoint has its digests."""
    hashing, self._hashing = self._hashing, None
    if hashing is not None:
      with self._writing(self.latest):
        hashing.result()

  def _writing(self, step: int | None) -> contextlib.AbstractContextManager[None]:
    return disk.writing(
      f"{self._path}: could not write the checkpoint of step {step}",
      "make room or choose another --workdir, then run the same command to resume from the last one",
    )


@contextlib.contextmanager
def _one_report() -> Iterator[None]:
  """Keeps the threads of Orbax and tensorstore from printing tracebacks of a write that fails in its body.

  The body raises the error, too, so it is reported once. Their last threads end only after that.
  """
  hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
  verbosity = logging.get_verbosity()
  sys.excepthook = lambda *_: None
  threading.excepthook = lambda _: None
  sys.unraisablehook = lambda _: None
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  except Exception:
    time.sleep(_SECONDS_TO_END)
    raise
  finally:
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    logging.set_verbosity(verbosity)


def _unreadable(path: pathlib.Path, error: Exception, remedy: str) -> UserError:
  return UserError(f"{path}: this checkpoint is of another model ({brief(error)}): {remedy}")


def _check_same(wanted, found) -> None:
  if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
    raise ValueError(f"{found.dtype}{list(found.shape)} where {wanted.dtype}{list(wanted.shape)} is needed")


def save_tree(path: pathlib.Path, tree: Tree) -> None:
  """Writes one pytree of arrays as an Orbax checkpoint at `path`."""
  with _one_report(), ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path.absolute(), tree)


def load_tree(path: pathlib.Path, like: Tree) -> Tree:
  """Reads a checkpoint of `save_tree`, written on any devices, into this process's memory.

  Args:
    path: path of the checkpoint.
    like: pytree with the expected structure, shapes and dtypes.

  Returns:
    The tree, as NumPy arrays.

  Raises:
    UserError: if the checkpoint is missing, cannot be read or is of another model.
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
