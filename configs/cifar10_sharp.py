"""Sharpness-aware unlearning on CIFAR-10 with ResNet-18 (arXiv 2506.13715).

  python -m hamu_jax.main --config=configs/cifar10_sharp.py:sharp_minmax,high,sam --workdir=runs/cifar10-sharp

The words after the colon choose method, memorization level and sharpness; they are explained in
`hamu_jax.config.sharpness_paper`. Images come from the Hugging Face hub or from the other sources that
`configs/cifar_hamu.py` lists. Memorization scores are estimated unless `--config.data.scores` names a file.
`smoke` runs on 2,000 images with ResNet-8: on two CPU cores, the ensemble, the original and the retrained
model take a quarter of an hour, and each method a minute.
"""

from hamu_jax.config import optimizer_config
from hamu_jax.config.sharpness_paper import sharp_config


def get_config(variant: str = ""):
  """See the module."""
  config, smoke = sharp_config(variant)
  config.data.scores = "estimate"
  config.model.name = "resnet18"
  if not smoke:
    return config
  config.model.name = "resnet8"
  config.data.update(train_size=2000, test_size=1000, forget_size=200)
  # The last epoch is taken, because 200 validation images would choose one by chance.
  config.train.update(epochs=15, batch_size=50, augment="none", evaluate_epochs=0.0, select="last")
  config.train.optimizer.learning_rate = 0.05
  config.memorization.update(models=20, fraction=0.5, parallel=4, epochs=20.0, batch_size=50, augment="none")
  config.memorization.optimizer = optimizer_config("adamw", 2e-3)
  config.memorization.optimizer.schedule = "cosine"
  is_minmax = config.method.name == "sharp_minmax"
  config.method.update(
    batch_size=100,
    epochs=min(config.method.epochs, 3.0),
    evaluate_epochs=0.0,
    retain_weight=0.97 if is_minmax else 0.9,
  )
  if config.method.name.startswith("hamu"):
    config.method.optimizer.learning_rate = 0.1
  config.mask.batch_size = 100
  config.evaluate.batch_size = 250
  return config
