"""Time that each method takes to unlearn on CIFAR-10 (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/cifar_timing.py --workdir=runs/cifar-timing

The time is `seconds.unlearn` of each summary.json, including compilation and the evaluation of the last
epoch. Run one job at a time. No reference is retrained. `:smoke` runs on 10,000 images, `:digits` on the
embedded digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.CIFAR, variant),
    "set": {"retrain": False, "method.evaluate_epochs": 0.0},
    "grid": {
      "method.name": ["ft", "ga", *experiments.BASELINES, *experiments.HAMU],
      "seed": experiments.SEEDS,
    },
  }
