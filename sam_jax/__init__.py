"""Sharpness-aware training and unlearning, on pytrees and functions, without any dataset, model or config."""

from sam_jax.saliency import SELECTIONS, apply_mask, complement, saliency_mask
from sam_jax.sharpness import MODES, perturbation, sam, sharpness_aware

__all__ = [
  "MODES",
  "SELECTIONS",
  "apply_mask",
  "complement",
  "perturbation",
  "saliency_mask",
  "sam",
  "sharpness_aware",
]
