"""Sharpness-aware unlearning on the 1,797 real handwritten digits: no download, minutes on a CPU.

  python -m hamu_jax.main --config=configs/digits_sharp.py:sharp_minmax,high,sam --workdir=runs/digits-sharp

The words after the colon choose method, memorization level and sharpness; they are explained in
`hamu_jax.config.sharpness_paper`. An ensemble estimates the memorization scores, and the run forgets 100
digits.
"""

from hamu_jax.config.digits import on_digits
from hamu_jax.config.sharpness_paper import sharp_config


def get_config(variant: str = ""):
  """See the module."""
  config, _ = sharp_config(variant)
  return on_digits(config, "resnet8")
