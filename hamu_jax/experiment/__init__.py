"""One experiment: its stages from the data to the evaluated models, alone or trained together with others.

`task` has the protocols that a modality implements; `vision` and `language` are two. May import all packages
that are below it in the order of imports.
"""

from hamu_jax.experiment.experiment import Experiment

__all__ = ["Experiment"]
