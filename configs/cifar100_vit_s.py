"""Sharpness-aware unlearning on CIFAR-100 with ViT-S (arXiv 2506.13715).

  python -m hamu_jax.main --config=configs/cifar100_vit_s.py:sharp_minmax,high,sam,pretrain_sam \
    --config.data.scores=cifar100_infl_matrix.npz --workdir=runs/cifar100-vit

The words after the colon choose method, memorization level and sharpness; they are explained in
`hamu_jax.config.sharpness_paper`. The scores are Feldman and Zhang's published ones, or `estimate` to train
the ensemble here. `smoke` runs on the embedded digits with a small ViT and estimated scores, in a few minutes
on a CPU.
"""

from hamu_jax.config.digits import on_digits
from hamu_jax.config.sharpness_paper import sharp_config


def get_config(variant: str = ""):
  """See the module."""
  config, smoke = sharp_config(variant)
  config.data.update(
    name="uoft-cs/cifar100",
    label_key="fine_label",
    scores="estimate",
    mean=(0.5071, 0.4866, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
  )
  config.model.name = "vit_s"
  return on_digits(config, "vit_s", width=96, depth=4, heads=3) if smoke else config
