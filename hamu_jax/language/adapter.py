"""A frozen base with a trained adapter: the forward pass of steps, and what follows from the sizes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from hamu_jax.data import packing
from hamu_jax.engine import methods
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine.objectives import TERMS, Outputs
from hamu_jax.errors import UserError
from hamu_jax.models import llama, lora, sharding
from hamu_jax.models.llama_config import LlamaConfig

Tree = Any


def make_apply(model: llama.Llama, config: lora.LoraConfig, tokens: lora.Tokens | None = None):
  """Makes `model.apply` for the variables of an experiment.

  Args:
    model: linen module.
    config: configuration of the adapter.
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
  """Makes (variables, batch, key, train) -> (Outputs of the predicted tokens, batch_stats).

  The output matrix is applied only where a token is predicted.

  Args:
    model: linen module.
    config: configuration of the adapter; its dropout acts in training mode.
    hidden_layer: layer whose states at the predictions are returned, too; None for none.
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
  """Gathers a batch from the packed rows of a window by places [B] in it; -1 is padding."""
  del key  # Dropout is keyed by the forward pass.
  present_B = rows_B >= 0
  taken = jax.tree.map(lambda leaf: leaf[rows_B.clip(0)], rows_data)
  batch = taken._asdict()
  batch["index"] = batch.pop("prediction_row")
  for name in ("mask", "alternative_mask", "example_mask"):
    batch[name] = batch[name] & present_B[:, None]
  return batch


class Adapted:
  """The part of an experiment on a language model that depends on sizes only, not on weights or texts.

  Attributes:
    init: (seed) -> variables of a new adapter, which does not change the model's outputs yet.
    template: shapes of these variables.

  Args:
    config: validated configuration.
    sizes: sizes of the model.

  Raises:
    UserError: the model lacks the layer that the method reads, or the adapter is wider than the model.
  """

  def __init__(self, config: ml_collections.ConfigDict, sizes: LlamaConfig):
    self._config, self._sizes = config, sizes
    options = config.language.lora
    self._lora = lora.LoraConfig(options.rank, options.alpha, options.dropout, tuple(options.targets))
    self._check_layer()
    if options.rank > sizes.hidden_size:
      raise UserError(
        f"config.language.lora.rank={options.rank}: the model is {sizes.hidden_size} wide; choose at "
        "most that"
      )
    abstract = llama.abstract_params(self._model())

    def init(seed):
      adapter = lora.init(jax.random.key(seed), self._lora, abstract)
      return {"params": lora.unstack(adapter), "batch_stats": {}}

    self.init = init
    self.template = jax.eval_shape(init, config.seed)

  def in_training_mode(self, options: ml_collections.ConfigDict) -> bool:
    """Always: dropout of the adapter acts in unlearning as in training."""
    del options
    return True

  def microbatch(self, training_mode: bool) -> int:
    """The number of packed rows that are differentiated at a time; 0 takes all rows of a batch.

    One long row has less padding than several short ones, so the default is 1. It is 0 for devices that share
    weights, since they gather the weights again for each piece.
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
    """The shapes of the frozen parameters, with their shardings on the mesh."""
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
    """The layer whose states the method reads; None if it reads none."""
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
