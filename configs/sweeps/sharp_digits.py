"""The sharpness paper's table on the embedded digits with ResNet-8 (arXiv 2506.13715).

  python -m launch.sweep --config=configs/sweeps/sharp_digits.py --workdir=runs/sharp-digits

Methods by level of memorization, with and without SAM in pretraining and in unlearning. `:smoke` takes a
small model and little data.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return experiments.sharp("hamu_jax:digits_sharp", variant)
