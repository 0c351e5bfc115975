"""HAMU's experiments on language models (arXiv 2606.02119) as configurations."""

import ml_collections

from hamu_jax.config.default import default_config, share
from hamu_jax.config.modalities import LANGUAGE_MODEL


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
  share(config, "train", "method")
  return config


def llama2_7b(variant: str, *, file: str) -> ml_collections.ConfigDict:
  """`language_config` with Llama-2-7B-chat in 16 bits.

  Args:
    variant: "" for eight or more devices of 16 GiB, half of them for each role and four for each copy of
      the weights; "gpu" for one large GPU.
    file: name of the configuration file, for the error message.
  """
  if variant not in ("", "gpu"):
    raise ValueError(f"{file}:{variant} is unknown; choose {file} or {file}:gpu")
  config = language_config()
  config.language.path = "meta-llama/Llama-2-7b-chat-hf"
  config.language.preset = "llama2_7b"
  config.language.dtype = config.language.param_dtype = "bfloat16"
  config.language.rematerialization = "full"
  config.text.template = "llama2"
  if variant == "gpu":
    config.language.attention = "cudnn"
  else:
    config.pairing = "pmap"
    config.mesh.weights = 4
  return config
