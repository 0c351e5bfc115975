"""The configuration of an experiment: its fields, their defaults, what they may be, and who reads them.

Files under `configs/` start from `default_config()`; the experiments of the papers are in `sharpness_paper`
and `language_paper`, small versions on embedded data in `digits`. May import `engine`, `data`, `metrics`,
`models`, `transforms` and `sam_jax`, whose tables of choices it checks against.
"""

from hamu_jax.config.default import default_config, optimizer_config, share

__all__ = ["default_config", "optimizer_config", "share"]
