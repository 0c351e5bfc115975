"""Methods on WaterDrum-TOFU whose retain set has no or semantic duplicates of the forget set
(arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/llm_semantic_similarity.py --workdir=runs/llm-similarity

`:gpu` is for one large GPU, `:smoke` runs a small model on fictitious authors. `:exact`, `:gpu_exact`
and `:smoke_exact` take exact duplicates.
"""

from hamu_jax.launch import experiments

CONFIGS = {
  "": "hamu_jax:waterdrum_llama2_hamu",
  "gpu": "hamu_jax:waterdrum_llama2_hamu:gpu",
  "smoke": "hamu_jax:tofu_smollm2_hamu:smoke",
}


def get_sweep(variant: str = ""):
  """See the module."""
  base, exact = variant.removesuffix("exact").removesuffix("_"), variant.endswith("exact")
  return {
    "config": experiments.choose(CONFIGS, base),
    "grid": {
      "method.name": [*experiments.HAMU, *experiments.BASELINES],
      "text.duplicates": ["exact"] if exact else ["none", "semantic"],
      "seed": experiments.SEEDS,
    },
  }
