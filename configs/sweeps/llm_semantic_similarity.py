"""Methods on WaterDrum-TOFU whose retain set has no, semantic or exact duplicates of the forget set
(arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/llm_semantic_similarity.py --workdir=runs/llm-similarity

`:gpu` is for one large GPU, `:smoke` runs a tiny random model on fictitious authors.
"""

from hamu_jax.launch import experiments

CONFIGS = {
  "": "hamu_jax:waterdrum_llama2_hamu",
  "gpu": "hamu_jax:waterdrum_llama2_hamu:gpu",
  "smoke": "hamu_jax:tofu_smollm2_hamu:smoke",
}


def get_sweep(variant: str = ""):
  """See the module."""
  return {
    "config": experiments.choose(CONFIGS, variant),
    "grid": {
      "method.name": [*experiments.HAMU, *experiments.BASELINES],
      "text.duplicates": ["none", "semantic", "exact"],
      "seed": experiments.SEEDS,
    },
  }
