"""What makes an experiment one on a language model: texts, a frozen base, and an adapter that is trained."""

import copy
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from hamu_jax.config import default as config_lib
from hamu_jax.data import encoding, packing, refusals, text
from hamu_jax.engine import methods
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine.objectives import TERMS, Outputs
from hamu_jax.errors import UserError
from hamu_jax.language.evaluation import Evaluator, Questions
from hamu_jax.language.feed import PackedTexts
from hamu_jax.metrics import tofu, watermark
from hamu_jax.models import llama, lora, lora_weights, pretrained, sharding
from hamu_jax.models.llama_config import LlamaConfig
from hamu_jax.paired import Paired
from hamu_jax.run import hosts, progress
from hamu_jax.run import stage_cache as stages

Tree = Any


class TextRequest(NamedTuple):
  """Which texts are learnt and which of them are forgotten; an `experiment.task.UnlearningRequest`.

  Attributes:
    fingerprint: of the texts that are learnt.
    indices: the examples to retain and to forget, which follow each other.
  """

  fingerprint: str
  indices: Paired

  @property
  def estimates_scores(self) -> bool:
    """Forget sets of texts go by no scores."""
    return False

  @property
  def validation(self) -> np.ndarray:
    """No texts are held out."""
    return np.zeros(0, np.int32)

  @property
  def available(self) -> np.ndarray:
    """[n] the indices of all examples."""
    return np.concatenate(self.indices)

  @property
  def original_indices(self) -> np.ndarray:
    """[n] the same; no scores go by numbers of texts."""
    return self.available

  def read_scores(self) -> None:
    """Forget sets of texts go by no scores."""

  def split(self, scores: np.ndarray | None) -> Paired:
    """The indices by role."""
    del scores
    return self.indices


def make_apply(model: llama.Llama, config: lora.LoraConfig, tokens: lora.Tokens | None = None):
  """`model.apply` of the variables that experiments have.

  Args:
    model: linen module.
    config: of the adapter.
    tokens: see `lora.with_lora`.

  Returns:
    ({"base": the model's parameters, "params": an adapter in the form of `lora.unstack`, ...}, *args,
    **kwargs) -> what `model.apply` returns.
  """
  apply = lora.with_lora(model.apply, config, tokens)

  def adapted(variables, *args, **kwargs):
    adapter = lora.stack(variables["params"])
    return apply({"params": variables["base"], lora.COLLECTION: adapter}, *args, **kwargs)

  return adapted


def make_forward(model: llama.Llama, config: lora.LoraConfig, hidden_layer: int | None = None):
  """(variables, batch, key, train) -> (Outputs of the predicted tokens, batch_stats).

  The output matrix is applied where a token is predicted only.

  Args:
    model: linen module.
    config: of the adapter; its dropout acts in training mode.
    hidden_layer: the layer whose states at the predictions are returned, too; None for none.
  """

  def forward(variables, batch, key, train):
    segment_BxT = batch["segment"]
    tokens, options = None, {}
    if train and config.dropout:
      tokens = lora.Tokens(batch["owner"], llama.segment_positions(segment_BxT))
      options = {"rngs": {"dropout": key}}
    apply = make_apply(model, config, tokens)

    def at_predictions(x_BxTxD):
      return jnp.take_along_axis(x_BxTxD, batch["target"][:, :, None], axis=1)

    features = functools.partial(
      apply, variables, batch["token"], segment_BxT=segment_BxT, method="features", **options
    )
    hidden_BxPxD = None
    if hidden_layer is None:
      x_BxTxD = features()
    else:
      x_BxTxD, recorded = features(mutable=["intermediates"])
      states_LxBxTxD = recorded["intermediates"]["layers"]["hidden"][0]
      hidden_BxPxD = at_predictions(states_LxBxTxD[hidden_layer])
    logits_BxPxV = apply(variables, at_predictions(x_BxTxD), method="unembed", **options)
    return Outputs(logits_BxPxV, hidden_BxPxD), variables["batch_stats"]

  return forward


def fetch(rows_data: packing.PackedRows, rows_B, key):
  """(packed rows of a window, places [B] in it, key) -> batch; -1 is padding."""
  del key  # Dropout is keyed by the forward pass.
  present_B = rows_B >= 0
  taken = jax.tree.map(lambda leaf: leaf[rows_B.clip(0)], rows_data)
  batch = taken._asdict()
  batch["index"] = batch.pop("prediction_row")
  for name in ("mask", "alternative_mask", "example_mask"):
    batch[name] = batch[name] & present_B[:, None]
  return batch


class Adapted:
  """What the steps of an experiment on a language model compute, which its sizes tell.

  Attributes:
    init: seed -> the variables of a new adapter, which changes nothing yet.
    template: their shapes.

  Args:
    config: validated.
    sizes: of the model.

  Raises:
    UserError: the model lacks the layer that the method reads.
  """

  def __init__(self, config: ml_collections.ConfigDict, sizes: LlamaConfig):
    self._config, self._sizes = config, sizes
    options = config.language.lora
    self._lora = lora.LoraConfig(options.rank, options.alpha, options.dropout, tuple(options.targets))
    self._check_layer()
    abstract = llama.abstract_params(self._model())

    def init(seed):
      adapter = lora.init(jax.random.key(seed), self._lora, abstract)
      return {"params": lora.unstack(adapter), "batch_stats": {}}

    self.init = init
    self.template = jax.eval_shape(init, config.seed)

  def in_training_mode(self, options: ml_collections.ConfigDict) -> bool:
    """Whether unlearning drops out, as training does."""
    del options
    return True

  def microbatch(self, training_mode: bool) -> int:
    """Packed rows that are differentiated at a time; 0 takes all.

    Long rows pad less than many, so it is one where nothing speaks against it: devices that share weights
    gather them anew for each piece.
    """
    del training_mode
    return self._config.method.microbatch or (0 if self._config.mesh.weights > 1 else 1)

  def forward(self, pairing: str):
    """See `make_forward`."""
    shared = pairing == "pmap" and self._config.mesh.weights > 1
    model = self._model(pairing_lib.WEIGHTS_AXIS if shared else None)
    return make_forward(model, self._lora, self._hidden_layer)

  def fetch(self, augment: str):
    """See `fetch`; texts are not augmented."""
    del augment
    return fetch

  def abstract_base(self, mesh: jax.sharding.Mesh | None) -> Tree:
    """The shapes of the frozen parameters, and where they lie on the mesh."""
    like = llama.abstract_params(self._model())
    return like if mesh is None else sharding.shard_like(like, mesh)

  @property
  def _method(self) -> methods.Method:
    return methods.METHODS[self._config.method.name]

  @property
  def _needs_alternatives(self) -> bool:
    return any(TERMS[name].needs_alternative for name in self._method.used_terms)

  @property
  def _hidden_layer(self) -> int | None:
    """The layer whose states the method reads, None if it reads none."""
    needed = any(TERMS[name].needs_hidden for name in self._method.used_terms)
    return self._config.method.layer if needed else None

  def _check_layer(self) -> None:
    layers = self._sizes.num_hidden_layers
    if self._hidden_layer is not None and self._hidden_layer >= layers:
      raise UserError(
        f"config.method.layer={self._hidden_layer}: the model has layers 0..{layers - 1}; choose one"
      )

  def _model(self, weights_axis: str | None = None) -> llama.Llama:
    options = self._config.language
    return llama.Llama(
      self._sizes,
      dtype=jnp.dtype(options.dtype),
      param_dtype=jnp.dtype(options.param_dtype),
      rematerialization=options.rematerialization,
      attention=options.attention,
      weights_axis=weights_axis,
    )


class Language(Adapted):
  """An experiment on a language model.

  Attributes:
    request: which examples are retained and forgotten.

  Args:
    config: validated.

  Raises:
    UserError: the model, its tokenizer or the texts are missing or do not fit each other.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    options, section = config.language, config.text
    self._pretrained = pretrained.open_model(options.path, preset=options.preset, seed=config.seed)
    super().__init__(config, self._pretrained.config)
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
    )
    self._check_owners()
    splits = self._texts.splits
    self._encoded = {name: self._encode(split.prompts, split.answers) for name, split in splits.items()}
    retained, forgotten = len(splits["retain"].answers), len(splits["forget"].answers)
    indices = np.arange(retained + forgotten, dtype=np.int32)
    # What is only evaluated must not train anything anew.
    learnt = [[splits[role].prompts, splits[role].answers] for role in Paired._fields]
    self.request = TextRequest(
      stages.fingerprint({"learnt": learnt}), Paired(indices[:retained], indices[retained:])
    )
    self._bases: dict[Any, Tree] = {}

  def with_config(self, config: ml_collections.ConfigDict):
    """The same data and model under a configuration that differs in settings and seeds alone."""
    other = copy.copy(self)
    other._config = config
    return other

  @property
  def inputs(self) -> dict[str, Any]:
    """What every stage depends on, as JSON values."""
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
    """What evaluations depend on beside the model."""
    return {"texts": self._texts.fingerprint}

  @property
  def unlearning_inputs(self) -> dict[str, Any]:
    """What unlearning depends on beside the method's options."""
    return {"refusals": self._refusals} if self._needs_alternatives else {}

  @property
  def provenance(self) -> dict[str, Any]:
    """What else the results come from: how many examples of each split were cut, if any were."""
    cut = {name: split.truncated for name, split in self._encoded.items() if split.truncated}
    return {"base": self._pretrained.name, "base_fingerprint": self._pretrained.fingerprint, "cut": cut}

  def feed(self, split: Paired) -> PackedTexts:
    """The training texts, packed."""
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
        # On the same devices in the same order, so nothing is copied.
        (loaded, *_) = self._bases.values()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        self._bases[mesh] = {"base": jax.device_put(loaded["base"], shardings)}
    return self._bases[mesh]

  def evaluator(self, split: Paired, scores: np.ndarray | None, mesh: jax.sharding.Mesh | None) -> Evaluator:
    """Evaluates every split of the texts."""
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
      mesh=mesh,
      progress=functools.partial(progress.Progress, enabled=hosts.is_writer()),
    )

  def final_evaluations(self, evaluator: Evaluator) -> dict[str, Any]:
    """What is measured of each example and, where answers are generated, of them."""
    options = self._config.evaluate
    if not options.generate:
      return {"per_example": ({}, lambda variables: ({}, evaluator.per_example(variables)))}
    depends_on = {
      name: options[name] for name in ("new_tokens", "tofu_variant", "watermark_tokenizer", "watermark_key")
    }
    return {"suite": (depends_on, lambda variables: self._suite(evaluator, variables))}

  @property
  def _refusals(self) -> tuple[str, ...]:
    return tuple(self._config.text.refusals) or refusals.REFUSALS

  def _suite(self, evaluator: Evaluator, variables: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Evaluator.suite`, and the watermark in the generated answers where that is asked for."""
    values, records = evaluator.suite(variables)
    options = self._config.evaluate
    if options.watermark_tokenizer:
      for name in ("retain", "forget"):
        owners, record = self._texts.splits[name].owners, records[name]
        assert owners is not None  # See `_check_owners`.
        record["watermark"] = watermark.strengths(
          record["generated"],
          [owners[row] for row in record["row"]],
          options.watermark_tokenizer,
          perturbation=options.watermark_key,
        )
      values["watermark"] = watermark.summary(records["forget"]["watermark"], records["retain"]["watermark"])
    return values, records

  def _check_owners(self) -> None:
    """Raises a UserError unless the texts' owners have watermarks that can be measured here."""
    options, keys = self._config.evaluate, set[str]()
    if not options.watermark_tokenizer:
      return
    for name in ("retain", "forget"):
      owners = self._texts.splits[name].owners
      if owners is None:
        raise UserError(
          "config.evaluate.watermark_tokenizer: the texts do not say whose watermark they carry; choose "
          "config.data.source='waterdrum', or leave it empty"
        )
      keys.update(owners)
    # What is missing or wrong is found here, not after hours of training.
    try:
      watermark.strengths(
        ["A text of no one."] * len(keys),
        sorted(keys),
        options.watermark_tokenizer,
        perturbation=options.watermark_key,
      )
    except UserError as error:
      raise UserError(f"config.evaluate.watermark_tokenizer: {error}") from None

  def training_evaluator(self, mesh: jax.sharding.Mesh | None) -> Any:
    """Forget sets of texts go by no memorization scores."""
    raise NotImplementedError("memorization ensembles are trained on images")

  def selection_score(self, summary: Mapping[str, Any]) -> float:
    """Training on texts keeps its last model."""
    raise NotImplementedError("config.train.select='best' is for images")

  def compare(self, results: dict[str, Any], examples: Mapping[str, Any]) -> None:
    """Adds to each result what compares it with the retrained model: TOFU's forget quality."""

    def ratios(name):
      forget = examples.get(name, {}).get("suite", {}).get("forget", {})
      return forget.get("truth_ratio")

    retrained = ratios("retrained")
    for name in results:
      if name != "retrained" and retrained is not None and ratios(name) is not None:
        results[name]["suite"]["forget_quality"] = tofu.forget_quality(ratios(name), retrained)
        results[name]["suite"]["truth_ratio_distance"] = tofu.truth_ratio_distance(ratios(name), retrained)

  def read_weights(self, path: str) -> Tree:
    """The adapter in a folder, in PEFT's format.

    Raises:
      UserError: it is for another model, or not as `config.language.lora` has it.
    """
    config, adapter = lora_weights.load_adapter(path, llama.abstract_params(self._model()))
    variables = {"params": lora.unstack(adapter), "batch_stats": {}}
    same = config.scaling == self._lora.scaling and config.rank == self._lora.rank
    wanted, found = (str(jax.tree.structure(tree)) for tree in (self.template, variables))
    if not same or wanted != found:
      raise UserError(
        f"config.model.weights={path!r}: the adapter has r={config.rank}, alpha={config.alpha:g} and "
        f"targets {', '.join(config.targets)}; set config.language.lora to the same"
      )
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), variables)

  def weights_fingerprint(self, path: str) -> str:
    """Of the adapter that `read_weights` reads."""
    return lora_weights.fingerprint(path)

  def save(self, workdir, name: str, variables: Tree) -> None:
    """Leaves an adapter in PEFT's format in the folder `name`."""
    lora_weights.save_adapter(
      workdir / name,
      lora.stack(jax.device_get(variables["params"])),
      self._lora,
      base_model=self._pretrained.name,
    )

  def work(self, feed: Any, stage: Any, steps: int) -> dict[str, Any]:
    """What the first steps of a stage compute: tokens of texts, and the share of padding beside them."""
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
      max_length=min(section.max_length, self._pretrained.config.max_position_embeddings),
    )

  def _questions(self, name: str, most: int) -> Questions:
    """A split to evaluate; of a large one, examples at even distances."""
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
