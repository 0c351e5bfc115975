"""HAMU on WaterDrum-TOFU with Llama-2-7B-chat and LoRA, the paper's hyper-parameters (arXiv 2606.02119).

  python -m hamu_jax.main --config=configs/waterdrum_llama2_hamu.py --workdir=runs/waterdrum

and as `waterdrum_llama2_hamu.py:forget_05`, `:forget_10,semantic`, `:forget_10,exact,gpu`: the share that is
forgotten, whether the retain set also has its exact or semantic duplicates (the paper's semantic-similarity
sweep), and one large GPU instead of a slice of small devices; see configs/tofu_llama2_hamu.py.

The watermark is measured with `pip install 'hamu-jax[waterfall]'` and
`--config.evaluate.watermark_tokenizer=meta-llama/Llama-3.1-8B-Instruct`, the tokenizer that WaterDrum's texts
were watermarked with.
"""

from hamu_jax.config.language_paper import llama2_7b
from hamu_jax.data.text import DUPLICATES

SUBSETS = ("forget_01", "forget_05", "forget_10")


def get_config(variant: str = ""):
  """Words, in any order: a subset, a kind of duplicates, "gpu"."""
  words = [word for word in variant.split(",") if word]
  subset = [word for word in words if word in SUBSETS]
  duplicates = [word for word in words if word in DUPLICATES]
  rest = [word for word in words if word not in (*SUBSETS, *DUPLICATES)]
  if len(subset) > 1 or len(duplicates) > 1:
    raise ValueError(f"waterdrum_llama2_hamu.py:{variant} names two subsets or two kinds of duplicates")
  config = llama2_7b(",".join(rest), file="waterdrum_llama2_hamu.py")
  config.data.source = "waterdrum"
  config.data.subset = subset[0] if subset else "forget_10"
  config.text.retain_split = "retain"
  config.text.forget_split = "forget"
  config.text.duplicates = duplicates[0] if duplicates else "none"
  return config
