"""The task of an experiment on a language model: texts, a frozen base, an adapter and the evaluation."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from hamu_jax.config import default as config_lib
from hamu_jax.data import encoding, packing, refusals, text
from hamu_jax.errors import UserError
from hamu_jax.language import watermarks
from hamu_jax.language.adapter import Adapted, make_apply
from hamu_jax.language.evaluation import Evaluator, Questions
from hamu_jax.language.feed import PackedTexts
from hamu_jax.language.request import TextRequest
from hamu_jax.metrics import tofu
from hamu_jax.models import llama, lora, lora_weights, pretrained
from hamu_jax.paired import Paired
from hamu_jax.run import hosts, progress
from hamu_jax.run import stage_cache as stages

Tree = Any


def _open(config: ml_collections.ConfigDict) -> pretrained.Pretrained:
  """Opens the base model of a configuration that this machine's devices can run; errors name the field."""
  options = config.language
  if options.dtype == "float16" and jax.default_backend() == "cpu":
    raise UserError(
      "config.language.dtype='float16': a CPU cannot multiply in it; set it to 'bfloat16' or 'float32'"
    )
  if options.attention == "cudnn" and jax.default_backend() != "gpu":
    raise UserError("config.language.attention='cudnn': there is no GPU here; set it to 'xla'")
  try:
    return pretrained.open_model(options.path, preset=options.preset, seed=config.seed)
  except UserError as error:
    named = "config.language." in str(error)
    raise UserError(str(error) if named else f"config.language.path={options.path!r}: {error}") from error


class Language(Adapted):
  """An experiment on a language model; an `experiment.task.Task`.

  Attributes:
    request: examples that are retained and forgotten.

  Args:
    config: validated configuration.

  Raises:
    UserError: the model, its tokenizer or the texts are missing or do not fit each other.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    section = config.text
    # The texts first: a wrong name of a split is found at once, while opening a model takes seconds.
    self._texts = text.load(
      config.data.source,
      name=config.data.name,
      path=config.data.path,
      subset=config.data.subset,
      question_key=section.question_key,
      answer_key=section.answer_key,
      retain_split=section.retain_split,
      forget_split=section.forget_split,
      test_split=section.test_split,
      suites=tuple(section.suites),
      duplicates=section.duplicates,
      retain_size=section.retain_size,
      forget_size=section.forget_size,
      test_size=section.test_size,
      seed=config.data.seed,
      duplicate_split=section.duplicate_split,
      sets=config_lib.places(config.data),
    )
    self._pretrained = _open(config)
    super().__init__(config, self._pretrained.config)
    watermarks.check_owners(config.evaluate, self._texts.splits)
    splits = self._texts.splits
    self._encoded = {name: self._encode(split.prompts, split.answers) for name, split in splits.items()}
    retained, forgotten = len(splits["retain"].answers), len(splits["forget"].answers)
    indices = np.arange(retained + forgotten, dtype=np.int32)
    # Texts that are only evaluated do not enter the fingerprint, so a change of them retrains nothing.
    learnt = [[splits[role].prompts, splits[role].answers] for role in Paired._fields]
    self.request = TextRequest(
      stages.fingerprint({"learnt": learnt}), Paired(indices[:retained], indices[retained:])
    )
    self._bases: dict[Any, Tree] = {}

  def with_config(self, config: ml_collections.ConfigDict):
    """The same data and model under a configuration that differs only in hyperparameters and seeds."""
    other = copy.copy(self)
    other._config = config
    return other

  @property
  def inputs(self) -> dict[str, Any]:
    """All that every stage depends on, as JSON values."""
    options, section = self._config.language.to_dict(), self._config.text.to_dict()
    for name in ("path", "attention", "rematerialization"):
      options.pop(name)
    return {
      "base": self._pretrained.fingerprint,
      "tokenizer": self._pretrained.tokenizer.fingerprint,
      "language": options,
      "text": {
        name: section[name] for name in ("template", "system_prompt", "max_length", "on_long", "row_length")
      },
    }

  @property
  def evaluation_inputs(self) -> dict[str, Any]:
    """All that evaluations depend on, besides the model and `config.evaluate`."""
    return {"texts": self._texts.fingerprint}

  @property
  def unlearning_inputs(self) -> dict[str, Any]:
    """All that unlearning depends on, besides the method's options."""
    return {"refusals": self._refusals} if self._needs_alternatives else {}

  @property
  def provenance(self) -> dict[str, Any]:
    """The base model, and how many examples of each split were cut, if any were."""
    cut = {name: split.truncated for name, split in self._encoded.items() if split.truncated}
    return {"base": self._pretrained.name, "base_fingerprint": self._pretrained.fingerprint, "cut": cut}

  def feed(self, split: Paired) -> PackedTexts:
    """The feed of the training texts, packed into rows of tokens."""
    del split
    texts = self._texts.splits
    examples = _joined(self._encoded["retain"], self._encoded["forget"])
    alternatives = None
    if self._needs_alternatives:
      prompts = texts["retain"].prompts + texts["forget"].prompts
      alternatives = self._encode(
        prompts, refusals.draw(self._refusals, len(prompts), config_lib.seed_of(self._config, "method"))
      )
    forget = np.zeros(len(examples.ids), bool)
    forget[self.request.indices.forget] = True
    return PackedTexts(
      packing.TextData(examples, alternatives, forget),
      self._config.text.row_length,
      max(self.microbatch(True), 1),
    )

  def base(self, mesh: jax.sharding.Mesh | None) -> Tree:
    """The frozen parameters, on the default device or split over the mesh; loaded once."""
    if mesh not in self._bases:
      like = self.abstract_base(mesh)
      if not self._bases:
        self._bases[mesh] = {"base": self._pretrained.load(like)}
      else:
        # The devices and their order are the same, so nothing is copied.
        (loaded, *_) = self._bases.values()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        self._bases[mesh] = {"base": jax.device_put(loaded["base"], shardings)}
    return self._bases[mesh]

  def evaluator(self, split: Paired, scores: np.ndarray | None, mesh: jax.sharding.Mesh | None) -> Evaluator:
    """The evaluator of all splits."""
    del split, scores
    options = self._config.evaluate
    return Evaluator(
      make_apply(self._model(), self._lora),
      self._pretrained.config,
      self.base(mesh),
      {name: self._questions(name, options.max_examples) for name in self._texts.splits},
      tokenizer=self._pretrained.tokenizer,
      batch_tokens=options.batch_tokens,
      new_tokens=options.new_tokens,
      eos_token_ids=self._pretrained.tokenizer.eos_token_ids,
      dtype=jnp.dtype(self._config.language.dtype),
      fraction=options.min_k_fraction,
      variant=options.tofu_variant,
      rouge_words=options.rouge_words,
      mesh=mesh,
      progress=functools.partial(progress.Progress, enabled=hosts.is_writer()),
    )

  def final_evaluations(self, evaluator: Evaluator) -> dict[str, Any]:
    """The evaluation of each example and, if answers are generated, of these answers."""
    options = self._config.evaluate
    if not options.generate:
      return {"per_example": ({}, lambda variables: ({}, evaluator.per_example(variables)))}
    depends_on = {
      name: options[name] for name in ("new_tokens", "tofu_variant", "watermark_tokenizer", "watermark_key")
    }
    # Evaluations of versions without this field stay valid.
    if options.rouge_words != "latin":
      depends_on["rouge_words"] = options.rouge_words
    return {"suite": (depends_on, lambda variables: self._suite(evaluator, variables))}

  @property
  def _refusals(self) -> tuple[str, ...]:
    return tuple(self._config.text.refusals) or refusals.REFUSALS

  def _suite(self, evaluator: Evaluator, variables: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Evaluator.suite`, and the watermark in the generated answers if it is asked for."""
    values, records = evaluator.suite(variables)
    if self._config.evaluate.watermark_tokenizer:
      values["watermark"] = watermarks.measure(self._config.evaluate, self._texts.splits, records)
    return values, records

  def training_evaluator(self, mesh: jax.sharding.Mesh | None) -> Any:
    """Not available: forget sets of texts do not depend on memorization scores."""
    raise NotImplementedError("memorization ensembles are trained on images")

  def selection_score(self, summary: Mapping[str, Any]) -> float:
    """Not available: training on texts keeps its last model."""
    raise NotImplementedError("config.train.select='best' is for images")

  def compare(self, results: dict[str, Any], examples: Mapping[str, Any]) -> None:
    """Adds TOFU's forget quality, which compares a model with the retrained one, to each result."""

    def ratios(name):
      forget = examples.get(name, {}).get("suite", {}).get("forget", {})
      return forget.get("truth_ratio")

    retrained = ratios("retrained")
    for name in results:
      if name != "retrained" and retrained is not None and ratios(name) is not None:
        results[name]["suite"]["forget_quality"] = tofu.forget_quality(ratios(name), retrained)
        results[name]["suite"]["truth_ratio_distance"] = tofu.truth_ratio_distance(ratios(name), retrained)

  def read_weights(self, path: str) -> Tree:
    """Reads an adapter from a folder in PEFT's format.

    Raises:
      UserError: it belongs to another model, or differs from `config.language.lora`.
    """
    config, adapter = lora_weights.load_adapter(path, llama.abstract_params(self._model()))
    variables = {"params": lora.unstack(adapter), "batch_stats": {}}
    same = config.scaling == self._lora.scaling and config.rank == self._lora.rank
    wanted, found = (str(jax.tree.structure(tree)) for tree in (self.template, variables))
    if not same or wanted != found:
      raise UserError(
        f"{path}: the adapter has r={config.rank}, alpha={config.alpha:g} and "
        f"targets {', '.join(config.targets)}; set config.language.lora to the same"
      )
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), variables)

  def weights_fingerprint(self, path: str) -> str:
    """The fingerprint of the adapter that `read_weights` reads."""
    return lora_weights.fingerprint(path)

  def save(self, workdir, name: str, variables: Tree) -> None:
    """Writes an adapter in PEFT's format to the folder `name`."""
    lora_weights.save_adapter(
      workdir / name,
      lora.stack(jax.device_get(variables["params"])),
      self._lora,
      base_model=self._pretrained.name,
    )

  def work(self, feed: Any, stage: Any, steps: int) -> dict[str, Any]:
    """The number of tokens of the first steps of a stage, and the share of padding in its computation."""
    if not steps:
      return {}
    return {
      "tokens": feed.tokens(stage.plan, 0, steps),
      "padding_share": feed.padding_share(stage.plan, steps),
    }

  def _encode(self, prompts, answers) -> encoding.Encoded:
    section = self._config.text
    return encoding.encode(
      self._pretrained.tokenizer,
      prompts,
      answers,
      template=section.template,
      system=section.system_prompt or None,
      on_long=section.on_long,
      max_length=min(section.max_length, limit := self._pretrained.config.max_position_embeddings),
      fixed=section.max_length >= limit,
    )

  def _questions(self, name: str, most: int) -> Questions:
    """The questions of a split to evaluate; at most `most` of them, at even distances."""
    split, answers = self._texts.splits[name], self._encoded[name]
    count = len(answers.ids)
    size = min(most or count, count)
    indices = (np.arange(size) * count // size).astype(np.int32)
    return Questions(
      split,
      answers,
      indices,
      paraphrased=self._encode(split.prompts, split.paraphrased) if split.paraphrased else None,
      perturbed=tuple(self._encode(split.prompts, answers) for answers in zip(*split.perturbed or ())),
    )


def _joined(first: encoding.Encoded, second: encoding.Encoded) -> encoding.Encoded:
  """The examples of two splits, one after the other."""
  return encoding.Encoded(
    first.ids + second.ids,
    np.concatenate([first.answer_start, second.answer_start]),
    first.truncated + second.truncated,
  )
