"""The experiments of the sharpness paper (arXiv 2506.13715) as configurations.

Files under `configs/` add a dataset and a model to `sharp_config(variant)`, where the variant is a list of
words such as `sharp_minmax,low,sam`, in any order:

- a method of the table: ft, ft_l1, ga, random_label, salun, neggrad, scrub_distill, sharp_minmax, retrain,
  or one of HAMU's paper;
- a level of memorization: high, mid, low, mixed;
- `sam` for sharpness-aware unlearning and `pretrain_sam` for sharpness-aware pretraining and retraining, both
  with radius 0.1; with `adaptive`, the radius is 1.0 and proportional to each weight's size;
- `adamw` to unlearn with AdamW, as the paper's code does, instead of SGD with momentum, as RUM does.
"""

from typing import NamedTuple

import ml_collections

from hamu_jax.config.default import default_config, optimizer_config, share
from hamu_jax.engine import methods
from sam_jax import memorization

SMOKE = "smoke"
_SWITCHES = ("sam", "pretrain_sam", "adaptive", "adamw", SMOKE)
_MASK_FRACTION = 0.5


class _Schedule(NamedTuple):
  """Learning rate and number of epochs of a method, from RUM (arXiv 2406.01257)."""

  learning_rate: float
  epochs: float


_SCHEDULES = {
  "ft": _Schedule(0.01, 10),
  "ft_l1": _Schedule(0.01, 10),
  "ga": _Schedule(1e-4, 5),
  "neggrad": _Schedule(0.01, 5),
  "scrub_distill": _Schedule(5e-3, 5),
  "random_label": _Schedule(0.1, 10),
  "salun": _Schedule(0.1, 10),
}
# The paper derives sharp_minmax from neggrad. It has none of HAMU's methods, which get the same values.
_DEFAULT_SCHEDULE = _SCHEDULES["neggrad"]


def sharp_config(variant: str = "") -> tuple[ml_collections.ConfigDict, bool]:
  """The paper's CIFAR-100 experiment without dataset and model.

  Args:
    variant: comma-separated words, see the module; empty for neggrad on the most memorized examples.

  Returns:
    The configuration, and whether the variant asks for the `smoke` form.

  Raises:
    ValueError: an unknown word, two methods or two levels, or a word that changes nothing.
  """
  words = [word for word in variant.split(",") if word]
  chosen = {"method": "neggrad", "level": "high"}
  seen = set()
  for word in words:
    kind = next(
      (
        name
        for name, choices in (("method", methods.METHODS), ("level", memorization.LEVELS))
        if word in choices
      ),
      None,
    )
    if kind is None and word not in _SWITCHES:
      raise ValueError(
        f"variant word {word!r} is unknown; choose from {', '.join(methods.METHODS)}; "
        f"{', '.join(memorization.LEVELS)}; {', '.join(_SWITCHES)}"
      )
    if kind in seen:
      raise ValueError(f"variant word {word!r} is the second {kind}; give one")
    if kind:
      seen.add(kind)
      chosen[kind] = word
  if "adaptive" in words and not {"sam", "pretrain_sam"} & set(words):
    raise ValueError("variant word 'adaptive' changes nothing without 'sam' or 'pretrain_sam'; add one")
  if "sam" in words and not methods.METHODS[chosen["method"]].unlearns:
    raise ValueError(f"variant word 'sam' changes nothing for {chosen['method']}; use 'pretrain_sam'")
  config = _unlearning(_training(default_config()), chosen["method"], "adamw" in words)
  share(config, "data", "train", "method", "sam", "mask", "memorization")
  config.data.update(forget="memorization", memorization_level=chosen["level"], forget_size=3000)
  rho = 1.0 if "adaptive" in words else 0.1
  config.sam.update(
    adaptive="adaptive" in words,
    rho=rho if "sam" in words else 0.0,
    train_rho=rho if "pretrain_sam" in words else 0.0,
  )
  return config, SMOKE in words


def _training(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Sets SGD with momentum under a cosine schedule, selected on a tenth of the training examples."""
  config.data.validation_fraction = 0.1
  config.train.update(epochs=200, batch_size=256, augment="crop_flip", select="best", evaluate_epochs=5.0)
  config.train.optimizer = optimizer_config("sgd", 0.1)
  config.train.optimizer.update(momentum=0.9, weight_decay=5e-4, schedule="cosine")
  config.memorization.update(epochs=50.0, batch_size=256, augment="crop_flip")
  config.memorization.optimizer = config.train.optimizer.copy_and_resolve_references()
  config.evaluate.membership = True
  return config


def _unlearning(config: ml_collections.ConfigDict, method: str, adamw: bool) -> ml_collections.ConfigDict:
  schedule = _SCHEDULES.get(method, _DEFAULT_SCHEDULE)
  config.method.update(
    name=method,
    epochs=float(schedule.epochs),
    batch_size=256,
    clip_norm=0.0,
    shuffle="each_epoch",
    epoch="pass",
    batch_norm="batch",
  )
  optimizer = optimizer_config("adamw" if adamw else "sgd", schedule.learning_rate)
  optimizer.weight_decay = 5e-4
  if not adamw:
    optimizer.momentum = 0.9
  if method.startswith("hamu"):
    # The radius is the learning rate times the norm of the clipped gradient; momentum would leave it.
    config.method.update(clip_norm=1.0, constraint_ratio=0.1, on_infeasible="project")
    optimizer.update(name="sgd", momentum=None, weight_decay=0.0)
  config.method.optimizer = optimizer
  if methods.METHODS[method].needs_mask:
    config.mask.fraction = _MASK_FRACTION
  return config
