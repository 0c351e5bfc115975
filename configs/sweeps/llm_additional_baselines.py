"""Further methods on TOFU beside HAMU's own baselines (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/llm_additional_baselines.py --workdir=runs/llm-more

`:gpu` is for one large GPU, `:waterdrum` and `:waterdrum_gpu` run on WaterDrum-TOFU, `:smollm2` runs SmolLM2
on a machine without an accelerator, `:smoke` a tiny random model.
"""

from launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  preference = ["npo", "simnpo", "dpo", "idk", "undial", "wga"]
  return {
      "config": experiments.choose(experiments.LANGUAGE, variant),
      "grid": {
          "method.name": ["ft", "ga", *preference, *(f"{name}_kl" for name in preference), "rmu"],
          "seed": experiments.SEEDS,
      },
  }
