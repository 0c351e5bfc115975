"""`configs/tofu_smollm2_hamu.py:smoke` on a dozen texts, for runs of seconds."""

import pathlib
import runpy

CONFIG = pathlib.Path(__file__).parent.parent.parent / "configs" / "tofu_smollm2_hamu.py"


def get_config():
  config = runpy.run_path(str(CONFIG))["get_config"]("smoke")
  config.text.update(retain_size=8, forget_size=4, test_size=4, template="question_answer")
  config.train.update(epochs=1, batch_size=6)
  config.train.optimizer.learning_rate = 0.01
  # Random weights of a smaller model, whose tokens are bytes.
  config.language.path = ""
  config.language.preset = "tiny"
  config.method.update(epochs=1.0, batch_size=4, constraint_ratio=0.1)
  config.method.optimizer.learning_rate = 1e-2
  config.evaluate.new_tokens = 3
  return config
