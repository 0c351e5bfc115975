"""`python -m launch.sweep`, from a clone: see `hamu_jax.launch.sweep`."""

import sys

from hamu_jax.run import preemption

if __name__ == "__main__":
  # The other imports take seconds.
  preemption.leave_on_signals()

from hamu_jax.launch.sweep import run

if __name__ == "__main__":
  sys.exit(run(sys.argv))
