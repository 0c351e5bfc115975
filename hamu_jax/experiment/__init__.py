"""One experiment: its stages from the data to the evaluated models, alone or trained together with others.

`task` says what a modality implements; `vision` and `language` are two. May import all of those floors below.
"""

from hamu_jax.experiment.experiment import Experiment

__all__ = ["Experiment"]
