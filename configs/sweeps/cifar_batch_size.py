"""Methods on CIFAR-10 over the batch size of unlearning (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/cifar_batch_size.py --workdir=runs/cifar-batch-size

The largest batch size is the whole forget class. `:smoke` runs on 10,000 images, `:digits` on the digits.
"""

from hamu_jax.launch import experiments

SIZES = {
  "": [500, 1000, 2500, 5000],
  "smoke": [100, 250, 500, 1000],
  "digits": [16, 32, 64, 128],
}


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.CIFAR, variant),
    "grid": {
      "method.name": [*experiments.HAMU, *experiments.BASELINES],
      "method.batch_size": SIZES[variant],
      "seed": experiments.SEEDS,
    },
  }
