"""The program `python -m hamu_jax.together`, see `hamu_jax.experiment.together`."""

import sys

from hamu_jax.experiment.together import run

if __name__ == "__main__":
  sys.exit(run(sys.argv))
