"""The sharpness paper's table on CIFAR-10 with ResNet-18 (arXiv 2506.13715).

  python -m launch.sweep --config=configs/sweeps/sharp_cifar10.py --workdir=runs/sharp-cifar10

Methods by level of memorization, with and without SAM in pretraining and in unlearning. `:smoke` takes a
small model and little data.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return experiments.sharp("hamu_jax:cifar10_sharp", variant)
