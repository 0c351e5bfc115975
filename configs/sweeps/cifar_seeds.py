"""HAMU and the baselines on CIFAR-10 over seeds of training and, for each, seeds of unlearning.

  python -m launch.sweep --config=configs/sweeps/cifar_seeds.py --workdir=runs/cifar-seeds --engine=vmap

The report has a table that separates the spread of a method due to the original model from the spread due to
the order of the data in unlearning. `:smoke` runs on 10,000 images, `:digits` on the digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.CIFAR, variant),
    "grid": {
      "method.name": [*experiments.BASELINES, *experiments.CONFLICT, *experiments.HAMU],
      "seed": experiments.SEEDS,
      "method.seed": [1, 2, 3],
    },
  }
