"""The program `python -m hamu_jax.merge`, see `hamu_jax.language.merge`."""

import sys

from hamu_jax.language.merge import run

if __name__ == "__main__":
  sys.exit(run(sys.argv))
