"""HAMU on TOFU with Llama-2-7B-chat and LoRA, with the paper's hyperparameters (arXiv 2606.02119).

  python -m hamu_jax.main --config=configs/tofu_llama2_hamu.py --workdir=runs/tofu-llama2

runs on devices of 16 GiB, such as a TPU v5e slice of eight or more. Each role gets half of the devices, and
four devices share one copy of the frozen weights. On one GPU of 40 GB or more, run

  python -m hamu_jax.main --config=configs/tofu_llama2_hamu.py:gpu --workdir=runs/tofu-llama2

The model is gated: accept its terms on the Hugging Face hub and log in, or give a folder with
`--config.language.path=DIR`. `python -m hamu_jax.plan --config=configs/tofu_llama2_hamu.py
--topology=v5e:2x4` estimates, without a TPU, whether it fits and how long a step takes.
"""

from hamu_jax.config.language_paper import llama2_7b


def get_config(variant: str = ""):
  """`""` is for a slice of small devices, `"gpu"` for one large GPU."""
  config = llama2_7b(variant, file="tofu_llama2_hamu.py")
  config.data.source = "tofu"
  config.text.retain_split = "retain90"
  config.text.forget_split = "forget10"
  config.text.test_split = "holdout10"
  config.text.suites = ("real_authors", "world_facts", "retain_perturbed")
  return config
