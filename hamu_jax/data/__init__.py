"""Datasets, retain and forget sets, and which rows each step sees."""

from hamu_jax.data.batching import ROLES, BatchPlan, training_plan, unlearning_plan
from hamu_jax.data.dataset import Dataset, ImageSplit
from hamu_jax.data.device import AUGMENTATIONS, augment, example_keys, normalize, take
from hamu_jax.data.sources import SOURCES, load
from hamu_jax.data.splits import FORGET_KINDS, make_split

__all__ = [
    "AUGMENTATIONS",
    "BatchPlan",
    "Dataset",
    "FORGET_KINDS",
    "ImageSplit",
    "ROLES",
    "SOURCES",
    "augment",
    "example_keys",
    "load",
    "make_split",
    "normalize",
    "take",
    "training_plan",
    "unlearning_plan",
]
