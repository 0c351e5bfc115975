"""Methods on CIFAR-10 over rho, the share of the forgotten class that is replaced by other examples, which
makes forgetting harder (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/cifar_rho.py --workdir=runs/cifar-rho

At rho = 1, a random tenth of all examples is forgotten.
`:smoke` runs on 10,000 images, `:digits` on the embedded digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.CIFAR, variant),
    "set": {"data.forget": "hard_probability"},
    "grid": {
      "method.name": [*experiments.HAMU, *experiments.BASELINES],
      "data.hard_probability": [0.0, 0.25, 0.5, 0.75, 1.0],
      "seed": experiments.drawn_seeds(),
    },
  }
