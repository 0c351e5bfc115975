"""HAMU and the baselines on CIFAR-10 over seeds of training and, for each, of unlearning.

  python -m launch.sweep --config=configs/sweeps/cifar_seeds.py --workdir=runs/cifar-seeds --engine=vmap

How much of a method's spread comes from the model that it starts from, and how much from the order in which
it sees the data: the report has a table of it. `:smoke` runs on 10,000 images, `:digits` on the digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.CIFAR, variant),
    "grid": {
      "method.name": [*experiments.BASELINES, *experiments.HAMU],
      "seed": experiments.SEEDS,
      "method.seed": [1, 2, 3],
    },
  }
