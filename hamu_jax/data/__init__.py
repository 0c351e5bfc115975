"""Datasets, retain and forget sets, and the examples that each step reads."""

from hamu_jax.data.batching import BatchPlan, join_plans
from hamu_jax.data.dataset import Dataset, ImageSplit
from hamu_jax.data.device import AUGMENTATIONS, augment, example_keys, normalize, take
from hamu_jax.data.plans import EPOCHS, ROLES, SHUFFLES, pass_plan, training_plan, unlearning_plan
from hamu_jax.data.scores import read_scores
from hamu_jax.data.sources import SOURCES, load
from hamu_jax.data.splits import FORGET_KINDS, make_split, validation_indices
from hamu_jax.data.window import window

__all__ = [
  "AUGMENTATIONS",
  "BatchPlan",
  "Dataset",
  "EPOCHS",
  "FORGET_KINDS",
  "ImageSplit",
  "ROLES",
  "SHUFFLES",
  "SOURCES",
  "augment",
  "example_keys",
  "join_plans",
  "load",
  "make_split",
  "normalize",
  "pass_plan",
  "read_scores",
  "take",
  "training_plan",
  "unlearning_plan",
  "validation_indices",
  "window",
]
