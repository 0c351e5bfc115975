"""Machine unlearning in JAX: HAMU, Sharp MinMax and the baselines, from gradients to whole experiments."""

import importlib
import warnings
from typing import Any

__version__ = "0.1.0"

# Modules that README or docs showed under these names before they moved.
_MOVED = {
  "methods": "hamu_jax.engine.methods",
  "objectives": "hamu_jax.engine.objectives",
  "preemption": "hamu_jax.run.preemption",
  "rundir": "hamu_jax.run.rundir",
}


def __getattr__(name: str) -> Any:
  if name not in _MOVED:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  warnings.warn(f"hamu_jax.{name} is now {_MOVED[name]}", DeprecationWarning, stacklevel=2)
  return importlib.import_module(_MOVED[name])
