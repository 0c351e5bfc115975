"""The program `python -m hamu_jax.together`, see `hamu_jax.experiment.together`."""

import importlib
import sys

from hamu_jax.run import preemption, progress

if __name__ == "__main__":
  # The other imports take seconds.
  preemption.leave_on_signals()
  with progress.starting(sys.argv):
    importlib.import_module("hamu_jax.experiment.together")

from hamu_jax.experiment.together import run

if __name__ == "__main__":
  sys.exit(run(sys.argv))
