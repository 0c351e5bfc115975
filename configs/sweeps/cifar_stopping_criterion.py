"""HAMU on CIFAR-10 with its stopping criterion, at rho 0.5 (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/cifar_stopping_criterion.py --workdir=runs/cifar-stopping

`cifar_stopping_rules.py` compares it with others.
`:smoke` runs on 10,000 images, `:digits` on the embedded digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.CIFAR, variant),
    "set": {
      "method.stop_on_criterion": True,
      "data.forget": "hard_probability",
      "data.hard_probability": 0.5,
    },
    "grid": {"method.name": experiments.HAMU, "seed": experiments.drawn_seeds()},
  }
