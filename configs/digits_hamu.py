"""HAMU on the 1,797 real handwritten digits that scikit-learn ships: no download, minutes on a CPU.

  python -m hamu_jax.main --config=configs/digits_hamu.py --workdir=runs/digits

Pretrains ResNet-20, retrains it without the digit 0, unlearns that digit with hamu-q and compares.
"""

from hamu_jax.config import default_config, share


def get_config():
  """The CIFAR-10 experiment on 8x8 grey images."""
  config = default_config()
  config.data.source = "digits"
  config.data.mean = (0.3055,)
  config.data.std = (0.3763,)
  config.train.epochs = 12
  config.train.batch_size = 128
  config.train.evaluate_epochs = 4.0
  config.evaluate.batch_size = 360
  config.method.batch_size = 128
  config.method.epochs = 4.0
  config.method.optimizer.learning_rate = 0.05
  config.method.constraint_ratio = 0.1
  # The digits are fitted so well that the first retain gradients allow a constraint ratio of at most a
  # hundredth. HAMU therefore goes as far as they allow instead of stopping.
  config.method.on_infeasible = "project"
  # HAMU and the training stages read these fields; other methods and imported weights ignore them.
  share(config, "train", "method")
  return config
