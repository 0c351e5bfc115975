"""HAMU on TOFU with one step for each tensor and one for the whole gradient (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/llm_full_grad.py --workdir=runs/llm-full-grad

`:gpu` is for one large GPU, `:waterdrum` and `:waterdrum_gpu` run on WaterDrum-TOFU, `:smollm2` runs SmolLM2
on a machine without an accelerator, `:smoke` a small model of the package.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.LANGUAGE, variant),
    "grid": {
      "method.name": experiments.HAMU,
      "method.scope": ["tensor", "global"],
      "seed": experiments.SEEDS,
    },
  }
