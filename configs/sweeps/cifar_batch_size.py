"""HAMU on CIFAR-10 over the batch size of unlearning (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/cifar_batch_size.py --workdir=runs/cifar-batch-size

`:smoke` runs on 10,000 images, `:digits` on the embedded digits.
"""

from hamu_jax.launch import experiments

PAPER = [128, 256, 512, 1024, 2048]
# For smaller sets.
SIZES = {"digits": [16, 32, 64, 128]}


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.CIFAR, variant),
    "grid": {
      "method.name": ["hamu-q"],
      "method.batch_size": SIZES.get(variant, PAPER),
      "seed": experiments.SEEDS,
    },
  }
