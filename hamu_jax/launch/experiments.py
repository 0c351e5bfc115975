"""The common parts of both papers' sweeps: base configurations, seeds and methods."""

from collections.abc import Mapping

from hamu_jax.errors import UserError

SEEDS = (41, 42, 43)
HAMU = ("hamu-q", "hamu-u")
# Those of all of HAMU's tables, and those that are compared in tables of their own.
BASELINES = ("ft", "ga", "gdiff", "kl", "scrub")
CONFLICT = ("gru", "pcgrad")

# Base configurations of HAMU's experiments by the variant of a sweep.
CIFAR = {
  "": "hamu_jax:cifar_hamu",
  "smoke": "hamu_jax:cifar_hamu:smoke",
  "digits": "hamu_jax:digits_hamu",
}
LANGUAGE = {
  "": "hamu_jax:tofu_llama2_hamu",
  "gpu": "hamu_jax:tofu_llama2_hamu:gpu",
  "waterdrum": "hamu_jax:waterdrum_llama2_hamu",
  "waterdrum_gpu": "hamu_jax:waterdrum_llama2_hamu:gpu",
  "smollm2": "hamu_jax:tofu_smollm2_hamu",
  "smoke": "hamu_jax:tofu_smollm2_hamu:smoke",
}

OPTIMIZERS = {
  "sgd": {"method.optimizer.name": "sgd"},
  "adamw": {"method.optimizer.name": "adamw"},
}

# The sharpness paper's methods, as words of its configurations; see `hamu_jax.config.sharpness_paper`.
SHARP_METHODS = (
  "ft",
  "ft_l1",
  "ga",
  "random_label",
  "salun",
  "neggrad",
  "scrub_distill",
  "sharp_minmax",
)
LEVELS = ("high", "mid", "low")


def choose(choices: Mapping, variant: str):
  """Looks up the entry of a sweep's variant.

  Args:
    choices: entries by variant; "" is the sweep without a variant.
    variant: the variant.

  Returns:
    The entry.

  Raises:
    UserError: for an unknown variant.
  """
  if variant not in choices:
    names = ", ".join(f":{name}" if name else "no variant" for name in choices)
    raise UserError(f"variant {variant!r} of the sweep is unknown; choose from {names}")
  return choices[variant]


def drawn_seeds() -> dict[str, dict]:
  """The seeds, each of which also draws the forget set."""
  return {str(seed): {"seed": seed, "data.seed": seed} for seed in SEEDS}


def constraint(config: str) -> dict:
  """HAMU's methods over the constraint ratio."""
  ratios = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
  return {"config": config, "grid": {"method.name": HAMU, "method.constraint_ratio": ratios, "seed": SEEDS}}


def stopping_rules(config: str) -> list[dict]:
  """HAMU's methods with each stopping rule, and the baselines with those that they have."""
  losses = {"never": {}, "losses": {"method.stop_on_loss": True}}
  criteria = {
    criterion: {"method.stop_on_criterion": True, "method.criterion": criterion}
    for criterion in ("published", "descent")
  }
  return [
    {"config": config, "grid": {"method.name": HAMU, "stop": losses | criteria, "seed": SEEDS}},
    {
      "config": config,
      "grid": {"method.name": ("gdiff", "kl", "scrub", *CONFLICT), "stop": losses, "seed": SEEDS},
    },
  ]


def sharp(config: str, variant: str) -> list[dict]:
  """A table of the sharpness paper: methods by level of memorization, with and without SAM.

  Args:
    config: configuration of a dataset and a model, in the syntax of `--config`.
    variant: "" or "smoke".

  Returns:
    The blocks of the sweep.
  """
  config = choose({"": config, "smoke": f"{config}:smoke"}, variant)
  pretraining, grid = ["", "pretrain_sam"], {"seed": SEEDS}
  return [
    {"config": config, "words": [SHARP_METHODS, LEVELS, ["", "sam"], pretraining], "grid": grid},
    # This method trains from scratch, so sharpness in unlearning does not apply to it.
    {"config": config, "words": [["retrain"], LEVELS, pretraining], "grid": grid},
  ]
