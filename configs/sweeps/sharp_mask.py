"""Methods with a saliency mask on CIFAR-100 over its fraction (arXiv 2506.13715).

  python -m launch.sweep --config=configs/sweeps/sharp_mask.py --workdir=runs/sharp-mask

Methods by level of memorization, with and without SAM in unlearning. `:smoke` runs on the embedded digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  config = "hamu_jax:cifar100_resnet50"
  return {
    "config": experiments.choose({"": config, "smoke": f"{config}:smoke"}, variant),
    "words": [["salun", "sharp_minmax"], experiments.LEVELS, ["", "sam"]],
    "grid": {"mask.fraction": [0.1, 0.3, 0.5], "seed": experiments.SEEDS},
  }
