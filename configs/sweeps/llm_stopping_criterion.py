"""HAMU on TOFU with its stopping criterion (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/llm_stopping_criterion.py --workdir=runs/llm-stopping

`llm_stopping_rules.py` compares it with others.
`:gpu` is for one large GPU, `:waterdrum` and `:waterdrum_gpu` run on WaterDrum-TOFU, `:smollm2` runs SmolLM2
on a machine without an accelerator, `:smoke` a small model of the package.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.LANGUAGE, variant),
    "set": {"method.stop_on_criterion": True},
    "grid": {"method.name": experiments.HAMU, "seed": experiments.SEEDS},
  }
