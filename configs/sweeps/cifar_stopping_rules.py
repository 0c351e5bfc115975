"""Stopping rules of unlearning on CIFAR-10 (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/cifar_stopping_rules.py --workdir=runs/cifar-rules

HAMU runs without a rule, with the published criterion, with the criterion that does not stop for opposed
gradients, and with thresholds on the losses, which the baselines have, too. `:smoke` runs on 10,000 images,
`:digits` on the embedded digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  config = experiments.choose(experiments.CIFAR, variant)
  return experiments.stopping_rules(config)
