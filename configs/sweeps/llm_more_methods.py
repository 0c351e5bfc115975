"""Further methods on TOFU beside HAMU's own baselines (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/llm_more_methods.py --workdir=runs/llm-more

`:gpu` is for one large GPU, `:waterdrum` and `:waterdrum_gpu` run on WaterDrum-TOFU, `:smollm2` runs SmolLM2
on a machine without an accelerator, `:smoke` a small model of the package.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  config = experiments.choose(experiments.LANGUAGE, variant)
  preference = ["npo", "simnpo", "dpo", "idk", "undial", "wga"]
  names = [*preference, *(f"{name}_kl" for name in preference)]
  # The tiny model has two layers.
  layer = {"method.layer": 1} if variant == "smoke" else {}
  return [
    {"config": config, "grid": {"method.name": names, "seed": experiments.SEEDS}},
    {"config": config, "set": layer, "grid": {"method.name": ["rmu"], "seed": experiments.SEEDS}},
  ]
