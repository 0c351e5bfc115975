"""Further methods on CIFAR-10 beside HAMU's own baselines (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/cifar_more_methods.py --workdir=runs/cifar-more

Methods that need a mask get one that marks the half of the weights with the largest gradients on the forget
set. `:smoke` runs on 10,000 images, `:digits` on the embedded digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  config = experiments.choose(experiments.CIFAR, variant)
  plain = ["ft_l1", "neggrad", "random_label", "scrub_distill"]
  return [
    {"config": config, "grid": {"method.name": plain, "seed": experiments.SEEDS}},
    {
      "config": config,
      "set": {"mask.fraction": 0.5},
      "grid": {"method.name": ["salun", "sharp_minmax"], "seed": experiments.SEEDS},
    },
  ]
