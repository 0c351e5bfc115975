"""The program `python -m hamu_jax.evaluate`, see `hamu_jax.experiment.evaluate`."""

import sys

from hamu_jax.run import preemption

if __name__ == "__main__":
  # The other imports take seconds.
  preemption.leave_on_signals()

from hamu_jax.experiment.evaluate import run

if __name__ == "__main__":
  sys.exit(run(sys.argv))
