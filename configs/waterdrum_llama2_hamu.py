"""HAMU on WaterDrum-TOFU with Llama-2-7B-chat and LoRA, with the paper's hyperparameters (arXiv 2606.02119).

  python -m hamu_jax.main --config=configs/waterdrum_llama2_hamu.py --workdir=runs/waterdrum

Variants are `waterdrum_llama2_hamu.py:forget_05`, `:forget_10,semantic`, `:forget_10,exact,gpu` and so on.
Their words choose the share that is forgotten, the exact or semantic duplicates in the retain set (the
paper's semantic-similarity sweep), and one large GPU instead of a slice of small devices; see
configs/tofu_llama2_hamu.py.

To measure the watermark, `pip install 'hamu-jax[waterfall]'` and set
`--config.evaluate.watermark_tokenizer=meta-llama/Llama-3.1-8B-Instruct`, the tokenizer with which WaterDrum's
texts were watermarked.
"""

from hamu_jax.config.language_paper import llama2_7b
from hamu_jax.data.text import DUPLICATES

SUBSETS = ("forget_01", "forget_05", "forget_10")


def get_config(variant: str = ""):
  """The variant's words, in any order, are a subset, a kind of duplicates and "gpu"."""
  words = [word for word in variant.split(",") if word]
  subset = [word for word in words if word in SUBSETS]
  duplicates = [word for word in words if word in DUPLICATES]
  rest = [word for word in words if word not in (*SUBSETS, *DUPLICATES)]
  if len(subset) > 1 or len(duplicates) > 1:
    raise ValueError(
      f"waterdrum_llama2_hamu.py:{variant} names two subsets or two kinds of duplicates; choose one of"
      f" {', '.join(SUBSETS)} and one of {', '.join(DUPLICATES)}"
    )
  config = llama2_7b(",".join(rest), file="waterdrum_llama2_hamu.py")
  config.data.source = "waterdrum"
  config.data.subset = subset[0] if subset else "forget_10"
  config.text.retain_split = "retain"
  config.text.forget_split = "forget"
  config.text.duplicates = duplicates[0] if duplicates else "none"
  return config
