"""What looks at gradients, features and losses: before a step (hardness) or after a run (geometry).

The programs `hardness` and `geometry`, the angles they are about, and their figures. May import everything
below the programs: `hamu_jax.experiment` to prepare an experiment, `hamu_jax.report.drawing` to draw.
"""

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
  if name != "gather":
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  # The documentation showed it here before it moved.
  warnings.warn("hamu_jax.analysis.gather is now hamu_jax.report.gather", DeprecationWarning, stacklevel=2)
  return importlib.import_module("hamu_jax.report.gather")
