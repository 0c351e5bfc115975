"""How programs are compiled: XLA's options in one place, and JAX's cache of compiled programs on the disk.

JAX keys an entry of the cache by the program, its options, the versions of JAX and XLA and the kind of the
device.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import jax

AUTO, OFF = "auto", "off"
# The oldest entries above this are removed when a program starts.
_MOST_BYTES = 2**30
# A disk with less room than this is left to the results.
_LEAST_FREE_BYTES = 2**30
# {platform: {option of XLA: value}}.
_OPTIONS = {
  # The library that XLA calls for convolutions by default uses one thread; Eigen, without it, uses all.
  "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
}
_CPU_INFO = pathlib.Path("/proc/cpuinfo")


def jit(function: Callable[..., Any], *, platform: str | None = None, **options: Any) -> Any:
  """`jax.jit` with the compiler's options for a platform; for functions that no other jitted one calls.

  Args:
    function: function to compile.
    platform: platform that it will run on; None is the default backend's.
    **options: options of `jax.jit`.
  """
  return jax.jit(function, compiler_options=_options(platform or jax.default_backend()), **options)


@functools.cache
def _options(platform: str) -> dict[str, Any] | None:
  """The options that the installed XLA knows; they make programs faster and change none."""
  options = _OPTIONS.get(platform)
  if options is None:
    return None
  try:
    jax.jit(lambda x: x + 1, compiler_options=options).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return None
  return options


def use(folder: str) -> pathlib.Path | None:
  """Makes this process keep its compiled programs in a folder, and take them from there.

  Nothing of it is ever an error: a folder that cannot be written, or a disk that is nearly full, leaves the
  cache out, and JAX compiles what it cannot read. A folder that was chosen by JAX's own option
  `jax_compilation_cache_dir` stays. Processes may share a folder.

  Args:
    folder: path of the folder; `AUTO` is one in the user's folder of caches; `OFF` changes nothing.

  Returns:
    The folder; None without one.
  """
  # The type of JAX's options does not declare them.
  if folder == OFF or getattr(jax.config, "jax_compilation_cache_dir"):  # noqa: B009
    return None
  path = (_user_folder() if folder == AUTO else pathlib.Path(folder)) / _machine()
  with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home.
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
      return None
    _prune(path, _MOST_BYTES)
    if shutil.disk_usage(path).free < _LEAST_FREE_BYTES:
      return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Small programs add up: a run has some sixty.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # JAX's own bound writes a second file an entry; a process killed between the two ends all later writing.
    jax.config.update("jax_compilation_cache_max_size", -1)
    # An entry that cannot be read or written costs its compilation, as it would without a cache.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    return path
  return None


def _user_folder() -> pathlib.Path:
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base) / "hamu_jax" / "compiled"


def _machine() -> str:
  """A name for machines that run the same machine code; JAX's key knows only that it is for a CPU."""
  features = ""
  with contextlib.suppress(OSError):
    lines = _CPU_INFO.read_text().splitlines()
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _prune(path: pathlib.Path, most: int) -> None:
  """Removes the entries that were not used for the longest time, until `most` bytes are left."""
  entries = []
  for entry in path.iterdir():
    with contextlib.suppress(FileNotFoundError):  # Another process has removed it.
      status = entry.stat()
      entries.append((max(status.st_atime, status.st_mtime), status.st_size, entry))
  excess = sum(size for _, size, _ in entries) - most
  for _, size, entry in sorted(entries):
    if excess <= 0:
      return
    entry.unlink(missing_ok=True)
    excess -= size
