"""HAMU on TOFU over the batch size of unlearning (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/llm_batch_size.py --workdir=runs/llm-batch-size

`:gpu` is for one large GPU, `:waterdrum` and `:waterdrum_gpu` run on WaterDrum-TOFU, `:smollm2` runs SmolLM2
on a machine without an accelerator, `:smoke` a small model of the package.
"""

from hamu_jax.launch import experiments

PAPER = [16, 32, 50, 64, 128]
# For smaller sets.
SIZES = {"smollm2": [4, 8, 16, 32], "smoke": [2, 4, 8]}


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(experiments.LANGUAGE, variant),
    "grid": {
      "method.name": ["hamu-q"],
      "method.batch_size": SIZES.get(variant, PAPER),
      "seed": experiments.SEEDS,
    },
  }
