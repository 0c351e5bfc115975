"""HAMU on CIFAR-10 with one step for the whole gradient (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/cifar_full_grad.py --workdir=runs/cifar-full-grad

`cifar_constraint.py` has the runs with one step for each tensor.
`:smoke` runs on 10,000 images, `:digits` on the embedded digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.CIFAR, variant),
    "grid": {"method.name": ["hamu-q"], "method.scope": ["global"], "seed": experiments.SEEDS},
  }
