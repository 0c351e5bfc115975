"""HAMU on TOFU over the constraint ratio (arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/llm_constraint.py --workdir=runs/llm-constraint

`:gpu` is for one large GPU, `:waterdrum` and `:waterdrum_gpu` run on WaterDrum-TOFU, `:smollm2` runs SmolLM2
on a machine without an accelerator, `:smoke` a small model of the package.
"""

from hamu_jax.launch import experiments


def get_sweep(variant: str = ""):
  """See the module."""
  return experiments.constraint(experiments.choose(experiments.LANGUAGE, variant))
