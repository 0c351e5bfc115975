"""When to stop unlearning on CIFAR-10 (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/cifar_stopping_criterion.py --workdir=runs/cifar-stopping

HAMU with no rule, the published criterion, the one that lets opposed gradients go on, and the thresholds on
the losses, which the baselines have, too. `:smoke` runs on 10,000 images, `:digits` on the embedded digits.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  config = experiments.choose(experiments.CIFAR, variant)
  return experiments.stopping_criterion(config)
