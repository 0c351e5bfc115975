"""HAMU on CIFAR-10 with the plain step and with AdamW (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/cifar_optimizer.py --workdir=runs/cifar-optimizer

Plain SGD applies HAMU's step exactly.
`:smoke` runs on 10,000 images, `:digits` on the embedded digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.CIFAR, variant),
    "grid": {
      "method.name": ["hamu-u"],
      "method.constraint_ratio": [0.9],
      "optimizer": experiments.OPTIMIZERS,
      "seed": experiments.SEEDS,
    },
  }
