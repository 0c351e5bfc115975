"""HAMU's CIFAR-10 experiment: ResNet-20, forget one class (arXiv 2606.02119).

  python -m hamu_jax.main --config=configs/cifar_hamu.py --workdir=runs/cifar

reads CIFAR-10 from the Hugging Face hub. Other sources are TFDS
(`--config.data.source=tfds --config.data.name=cifar10`), a local Hugging Face parquet folder
(`--config.data.source=parquet --config.data.path=DIR`) or the original binary archive
(`--config.data.source=cifar10_binary --config.data.path=cifar-10-binary.tar.gz`).

`configs/cifar_hamu.py:smoke` is the same experiment on 10,000 images with small batches, for a machine
without an accelerator. Other methods are chosen as in `--config.method.name=gdiff`.
"""

from hamu_jax.config import default_config, share


def get_config(variant: str = ""):
  """`""` is the paper's experiment, `"smoke"` the small one."""
  config = default_config()
  if variant == "smoke":
    config.data.train_size = 10_000
    config.data.test_size = 2_000
    config.train.epochs = 10
    config.train.batch_size = 128
    config.train.augment = "flip"
    config.train.evaluate_epochs = 5.0
    config.train.optimizer.learning_rate = 2e-3
    config.train.optimizer.schedule = "cosine"
    config.method.epochs = 0.45
    config.method.batch_size = 250
    config.method.evaluate_epochs = 0.0
    config.method.optimizer.learning_rate = 0.03
    config.method.constraint_ratio = 0.1
    config.method.on_infeasible = "project"
    config.evaluate.batch_size = 250
    # HAMU and the training stages read these fields; other methods and imported weights ignore them.
    share(config, "train", "method")
  elif variant:
    raise ValueError(f"cifar_hamu.py:{variant} is unknown; choose cifar_hamu.py or cifar_hamu.py:smoke")
  return config
