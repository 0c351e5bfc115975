"""Time of a step of each method on CIFAR-10 (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/cifar_timing.py --workdir=runs/cifar-timing

The time is `timing.unlearn.step_seconds` of each summary.json: that of a step once its program is compiled.
Run one job at a time. One epoch is trained, nothing is retrained, and nothing is evaluated before its end.
`:smoke` runs on 10,000 images, `:digits` on the embedded digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.CIFAR, variant),
    "set": {"retrain": False, "method.epochs": 1.0, "method.evaluate_epochs": 0.0},
    "grid": {"method.name": [*experiments.BASELINES, *experiments.HAMU], "seed": experiments.SEEDS},
  }
