"""HAMU on TOFU over the constraint ratio (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/llm_constraint.py --workdir=runs/llm-constraint

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
      "method.constraint_ratio": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
      "seed": experiments.SEEDS,
    },
  }
