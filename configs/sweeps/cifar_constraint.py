"""HAMU on CIFAR-10 over the constraint ratio (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/cifar_constraint.py --workdir=runs/cifar-constraint

`:smoke` runs on 10,000 images, `:digits` on the embedded digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return experiments.constraint(experiments.choose(experiments.CIFAR, variant))
