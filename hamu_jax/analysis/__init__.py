"""Analyses gradients, features and losses: before a step (hardness) or after a run (geometry).

The package has the programs `hardness` and `geometry`, their measures and their figures. It may import all
packages below the programs, such as `hamu_jax.experiment` and `hamu_jax.report.drawing`.
"""

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
  if name != "gather":
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  # The documentation showed this module here before it moved.
  warnings.warn("hamu_jax.analysis.gather is now hamu_jax.report.gather", DeprecationWarning, stacklevel=2)
  return importlib.import_module("hamu_jax.report.gather")
