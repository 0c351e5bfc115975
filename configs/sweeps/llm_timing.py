"""Time of a step of each method on TOFU (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/llm_timing.py --workdir=runs/llm-timing

The time is `timing.unlearn.step_seconds` of each summary.json: that of a step once its program is compiled.
Run one job at a time. One epoch is trained, nothing is retrained, and nothing is evaluated before its end.
`:gpu` is for one large GPU, `:waterdrum` and `:waterdrum_gpu` run on WaterDrum-TOFU, `:smollm2` runs SmolLM2
on a machine without an accelerator, `:smoke` a small model of the package.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.LANGUAGE, variant),
    "set": {
      "retrain": False,
      "evaluate.generate": False,
      "method.epochs": 1.0,
      "method.evaluate_epochs": 0.0,
    },
    "grid": {
      "method.name": [*experiments.BASELINES, *experiments.CONFLICT, *experiments.HAMU],
      "seed": experiments.SEEDS,
    },
  }
