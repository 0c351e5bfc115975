"""Stopping rules of unlearning on TOFU (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/llm_stopping_rules.py --workdir=runs/llm-rules

The rules are those of cifar_stopping_rules.py.
`:gpu` is for one large GPU, `:waterdrum` and `:waterdrum_gpu` run on WaterDrum-TOFU, `:smollm2` runs SmolLM2
on a machine without an accelerator, `:smoke` a small model of the package.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  config = experiments.choose(experiments.LANGUAGE, variant)
  return experiments.stopping_rules(config)
