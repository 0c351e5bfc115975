"""Methods on WaterDrum-TOFU whose retain set has no, semantic or exact duplicates of the forget set
(arXiv 2606.02119).

  python -m launch.sweep --config=configs/sweeps/llm_semantic_similarity.py --workdir=runs/llm-similarity

`:gpu` is for one large GPU, `:smoke` runs a tiny random model on fictitious authors.
"""

from launch import experiments

CONFIGS = {
  "": "configs/waterdrum_llama2_hamu.py",
  "gpu": "configs/waterdrum_llama2_hamu.py:gpu",
  "smoke": "configs/tofu_smollm2_hamu.py:smoke",
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
