"""Experiments brought down to the digits that scikit-learn ships."""

import ml_collections

from hamu_jax.config.default import optimizer_config, share

# An epoch has a dozen steps of the training set and one of the forget set, so learning rates are larger than
# on CIFAR-100, and the forget loss has more weight.
_RATES = {"ga": 0.02, "scrub_distill": 0.03, "hamu-q": 0.1, "hamu-u": 0.1}
_RETAIN_WEIGHT = 0.9
# The two parts of sharp_minmax move different weights, so only this weight restrains the forgetting part.
_MINMAX_RETAIN_WEIGHT = 0.97


def on_digits(config: ml_collections.ConfigDict, model: str, **options) -> ml_collections.ConfigDict:
  """Runs a memorization experiment on 8x8 grey images, with estimated scores, in minutes on a CPU.

  Args:
    config: configuration of the experiment on another dataset; it is changed and returned.
    model: name of a small architecture for 8x8 images.
    **options: options of the model.
  """
  config.data.update(
    source="digits",
    name="",
    label_key="",
    mean=(0.3055,),
    std=(0.3763,),
    scores="estimate",
    forget_size=100,
    stream=False,
    image_size=0,
    test_split="",
    subset="",
  )
  config.model.update(name=model, **options)
  config.train.update(epochs=12, batch_size=128, augment="none", evaluate_epochs=4.0)
  config.train.optimizer.update(learning_rate=0.05, warmup_epochs=0.0)
  config.memorization.update(models=48, fraction=0.5, parallel=16, epochs=6.0, batch_size=64, augment="none")
  config.memorization.optimizer = optimizer_config("adamw", 3e-3)
  config.memorization.optimizer.schedule = "cosine"
  is_minmax = config.method.name == "sharp_minmax"
  config.method.update(
    batch_size=100,
    augment="none",
    evaluate_epochs=0.0,
    retain_weight=_MINMAX_RETAIN_WEIGHT if is_minmax else _RETAIN_WEIGHT,
  )
  optimizer = config.method.optimizer
  optimizer.learning_rate = _RATES.get(config.method.name, optimizer.learning_rate)
  config.mask.batch_size = 100
  config.evaluate.batch_size = 360
  share(config, "data", "train", "method", "mask", "memorization")
  return config
