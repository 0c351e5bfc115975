"""`configs/digits_sharp.py` with every stage in a second: 360 of 400 digits are learnt from."""

import pathlib
import runpy

CONFIG = pathlib.Path(__file__).parent.parent.parent / "configs" / "digits_sharp.py"


def get_config(variant: str = ""):
  config = runpy.run_path(str(CONFIG))["get_config"](variant)
  config.model.name = "mlp"
  config.data.update(train_size=400, test_size=150, forget_size=40)
  config.train.update(epochs=3, batch_size=64, evaluate_epochs=1.0)
  config.method.update(epochs=2.0, batch_size=32)
  config.memorization.update(models=16, parallel=8, epochs=3.0, batch_size=60)
  config.mask.batch_size = 32
  return config
