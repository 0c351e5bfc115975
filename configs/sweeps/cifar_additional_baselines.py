"""The baselines on CIFAR-10 (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/cifar_additional_baselines.py --workdir=runs/cifar-baselines

`:smoke` runs on 10,000 images, `:digits` on the embedded digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.CIFAR, variant),
    "grid": {"method.name": [*experiments.CONFLICT, *experiments.BASELINES], "seed": experiments.SEEDS},
  }
