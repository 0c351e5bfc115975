"""The sharpness paper's table on ImageNet-1k with ResNet-50 (arXiv 2506.13715).

  python -m launch.sweep --config=configs/sweeps/sharp_imagenet.py --workdir=runs/sharp-imagenet

Methods by level of memorization, with and without SAM in pretraining and in unlearning. `:smoke` takes a
small model and little data.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return experiments.sharp("hamu_jax:imagenet_resnet50", variant)
