"""`python -m launch.sweep`, from a clone: see `hamu_jax.launch.sweep`."""

import sys

from hamu_jax.launch.sweep import run

if __name__ == "__main__":
  sys.exit(run(sys.argv))
