"""HAMU on CIFAR-10 over the constraint ratio (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/cifar_constraint.py --workdir=runs/cifar-constraint

`:smoke` runs on 10,000 images, `:digits` on the embedded digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.CIFAR, variant),
    "grid": {
      "method.name": experiments.HAMU,
      "method.constraint_ratio": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
      "seed": experiments.SEEDS,
    },
  }
