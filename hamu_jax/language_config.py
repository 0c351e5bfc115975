"""The default experiment on a language model."""

import ml_collections

from hamu_jax.config import LANGUAGE_MODEL, default_config


def language_config() -> ml_collections.ConfigDict:
  """HAMU's TOFU experiment (arXiv 2606.02119), without the model and the data.

  LoRA of rank 8, alpha 16 and dropout 0.05 on all projections; fine-tuning 10 epochs at batch 64 with AdamW
  at 1e-4; unlearning 10 epochs at batch 50 of each role, learning rate 1e-4 and constraint ratio 0.5.
  """
  config = default_config()
  config.model.name = LANGUAGE_MODEL
  config.data.name = ""
  config.train.epochs = 10
  config.train.batch_size = 64
  config.train.select = "last"
  config.train.evaluate_epochs = 0.0
  config.train.optimizer.learning_rate = 1e-4
  config.method.epochs = 10.0
  config.method.batch_size = 50
  config.method.evaluate_epochs = 0.0
  config.method.optimizer.learning_rate = 1e-4
  return config
