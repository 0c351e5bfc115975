"""The baselines on TOFU (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/llm_additional_baselines.py --workdir=runs/llm-baselines

`:gpu` is for one large GPU, `:waterdrum` and `:waterdrum_gpu` run on WaterDrum-TOFU, `:smollm2` runs SmolLM2
on a machine without an accelerator, `:smoke` a small model of the package.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.LANGUAGE, variant),
    "grid": {"method.name": [*experiments.CONFLICT, *experiments.BASELINES], "seed": experiments.SEEDS},
  }
