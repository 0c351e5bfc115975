"""Time that each method takes to unlearn on TOFU (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/llm_timing.py --workdir=runs/llm-timing

The results are `seconds.unlearn` and `work` of each summary.json, including compilation. Run one job at a
time. No reference is retrained and nothing is generated.
`:gpu` is for one large GPU, `:waterdrum` and `:waterdrum_gpu` run on WaterDrum-TOFU, `:smollm2` runs SmolLM2
on a machine without an accelerator, `:smoke` a tiny random model.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.LANGUAGE, variant),
    "set": {"retrain": False, "evaluate.generate": False},
    "grid": {
      "method.name": ["ft", "ga", *experiments.BASELINES, *experiments.HAMU],
      "seed": experiments.SEEDS,
    },
  }
