"""The sharpness paper's table on CIFAR-100 with ViT-S (arXiv 2506.13715).

  python -m launch.sweep --config=configs/sweeps/sharp_cifar100_vit.py --workdir=runs/sharp-cifar100-vit

Methods by level of memorization, with and without SAM in pretraining and in unlearning. `:smoke` takes a
small model and little data.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return experiments.sharp("hamu_jax:cifar100_vit_s", variant)
