"""Llama: a decoder of RMSNorm, rotary embedding, grouped-query attention and SwiGLU.

Source: Touvron et al., Llama 2 (2023); Grattafiori et al., The Llama 3 Herd of Models (2024), as
Hugging Face's `LlamaForCausalLM` computes them. The submodules have the names used there.

Shapes: B rows, T tokens of a row, S slots of the cache, D hidden size, N query heads, K key and
value heads, H head dimension, F intermediate size, L layers, V vocabulary.

The parameters of all layers are stacked, [L, ...], and the layers run in a loop, so that a model of any
depth compiles in the time of one layer.
"""

import functools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hamu_jax.errors import UserError
from hamu_jax.models import sharding
from hamu_jax.models.llama_config import LlamaConfig
from hamu_jax.models.rotary import rotary_angles, rotate, segment_positions

Implementation = Literal["xla", "cudnn"]
_INIT = nn.initializers.normal(0.02)
# The values that a layer keeps for its backward pass; all others are computed again.
_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
REMATERIALIZATION = {
  "none": None,  # everything is kept
  "dots": _DOTS,  # the outputs of the projections
  "full": jax.checkpoint_policies.nothing_saveable,  # the layer's input only
}
# Collections with one entry per layer. The model itself does not define "lora"; see `models.lora`.
_STACKED = {"params": 0, "lora": 0, "intermediates": 0}


class Cache(NamedTuple):
  """Keys and values of the tokens seen so far.

  Attributes:
    key_LxBxSxKxH: keys, rotated by their positions.
    value_LxBxSxKxH: values.
    valid_BxS: bool, whether a slot holds a token. It is False for padding and for unwritten slots.
    length: int32 [], number of slots written so far.
  """

  key_LxBxSxKxH: jax.Array
  value_LxBxSxKxH: jax.Array
  valid_BxS: jax.Array
  length: jax.Array


class _Context(NamedTuple):
  """Inputs that all layers share.

  Attributes:
    angles_BxTxR: float32 rotation angles of the R = H / 2 pairs of a head, in radians.
    mask_Bx1xTxS: bool, whether a token may attend to another. Without a cache, causality is not part of it.
    start: first slot of the cache to write, or None without a cache.
  """

  angles_BxTxR: jax.Array
  mask_Bx1xTxS: jax.Array | None
  start: jax.Array | None


class Attention(nn.Module):
  """Grouped-query attention with rotary embedding.

  Attributes:
    config: sizes of the model.
    dtype: type of the computation; the rotation and the softmax are in float32.
    param_dtype: type of the parameters.
    implementation: `implementation` of `jax.nn.dot_product_attention`, used without a cache.
  """

  config: LlamaConfig
  dtype: Any
  param_dtype: Any
  implementation: Implementation

  @nn.compact
  def __call__(self, x_BxTxD, context: _Context, layer, cache):
    """-> ([B, T, D], the updated stacks of keys and values or None)."""
    config = self.config

    def project(name, heads):
      y = _linear(self, heads * config.head_dim, name)(x_BxTxD)
      return y.reshape(*x_BxTxD.shape[:2], heads, config.head_dim)

    q_BxTxNxH = rotate(project("q_proj", config.num_attention_heads), context.angles_BxTxR)
    k_BxTxKxH = rotate(project("k_proj", config.num_key_value_heads), context.angles_BxTxR)
    v_BxTxKxH = project("v_proj", config.num_key_value_heads)
    if cache is None:
      y_BxTxNxH = jax.nn.dot_product_attention(
        q_BxTxNxH,
        k_BxTxKxH,
        v_BxTxKxH,
        mask=context.mask_Bx1xTxS,
        is_causal=True,
        implementation=self.implementation,
      )
    else:
      # Stacks that are carried through the loop over layers are written in place.
      assert context.start is not None  # It is set whenever there is a cache.
      at = (layer, 0, context.start, 0, 0)
      cache = tuple(
        lax.dynamic_update_slice(stack, new[None].astype(stack.dtype), at)
        for stack, new in zip(cache, (k_BxTxKxH, v_BxTxKxH), strict=True)
      )
      k_BxSxKxH, v_BxSxKxH = (lax.dynamic_index_in_dim(stack, layer, keepdims=False) for stack in cache)
      y_BxTxNxH = jax.nn.dot_product_attention(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, mask=context.mask_Bx1xTxS)
    y = y_BxTxNxH.reshape(*x_BxTxD.shape[:2], -1)
    return _linear(self, config.hidden_size, "o_proj")(y), cache


class SwiGLU(nn.Module):
  """`down(silu(gate(x)) * up(x))`.

  Attributes:
    config: sizes of the model.
    dtype: type of the computation.
    param_dtype: type of the parameters.
  """

  config: LlamaConfig
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x_BxTxD):
    """[B, T, D] -> [B, T, D]."""
    gate_BxTxF = _linear(self, self.config.intermediate_size, "gate_proj")(x_BxTxD)
    up_BxTxF = _linear(self, self.config.intermediate_size, "up_proj")(x_BxTxD)
    return _linear(self, self.config.hidden_size, "down_proj")(nn.silu(gate_BxTxF) * up_BxTxF)


class Layer(nn.Module):
  """`y = x + attention(norm(x))`, then `y + swiglu(norm(y))`: the body of the loop over layers.

  It sows its output as "hidden" into "intermediates".
  """

  config: LlamaConfig
  dtype: Any
  param_dtype: Any
  implementation: Implementation

  @nn.compact
  def __call__(self, carry, layer, context: _Context):
    """((x [B, T, D], cache stacks or None), layer number, shared) -> (both updated, None)."""
    x_BxTxD, cache = carry
    attention = Attention(self.config, self.dtype, self.param_dtype, self.implementation, name="self_attn")
    y_BxTxD, cache = attention(_norm(self, "input_layernorm")(x_BxTxD), context, layer, cache)
    x_BxTxD += y_BxTxD
    mlp = SwiGLU(self.config, self.dtype, self.param_dtype, name="mlp")
    x_BxTxD += mlp(_norm(self, "post_attention_layernorm")(x_BxTxD))
    self.sow("intermediates", "hidden", x_BxTxD)
    return (x_BxTxD, cache), None


class Llama(nn.Module):
  """A language model: the logits of the next token at each position.

  Attributes:
    config: sizes of the model.
    dtype: type of the computation. Norms, rotary angles, the attention's softmax and the logits are
      always in float32.
    param_dtype: type of the parameters, which are cast where they are used.
    rematerialization: a key of `REMATERIALIZATION`.
    attention: implementation of `jax.nn.dot_product_attention` for whole sequences: "xla", or
      "cudnn" on a GPU in 16 bits.
    weights_axis: mesh axis over which the parameters may be split inside `jax.shard_map`, as in
      `sharding.base_specs`. Each parameter is gathered where it is used. None if they are not split.
  """

  config: LlamaConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  rematerialization: str = "none"
  attention: Implementation = "xla"
  weights_axis: str | None = None

  def __post_init__(self):
    super().__post_init__()
    for field, choices in (("rematerialization", REMATERIALIZATION), ("attention", ("xla", "cudnn"))):
      if getattr(self, field) not in choices:
        raise UserError(f"{field}={getattr(self, field)!r}: choose from {', '.join(choices)}")
    if self.attention == "cudnn" and jnp.dtype(self.dtype).itemsize != 2:
      raise UserError(
        f"attention='cudnn' computes in 16 bits, not in {jnp.dtype(self.dtype).name}; choose 'xla'"
      )
    if self.weights_axis and self.rematerialization == "none":
      raise UserError(
        f"weights_axis={self.weights_axis!r} with rematerialization='none' would keep the"
        " gathered weights of all layers; choose 'dots' or 'full'"
      )

  def setup(self):
    config = self.config
    self.embed_tokens = nn.Embed(
      config.vocab_size,
      config.hidden_size,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      embedding_init=_INIT,
    )
    layer = self._gathering(Layer, "layers")
    if self.rematerialization != "none":
      # Inside a loop, XLA cannot merge the recomputation with the forward pass, so CSE may stay on.
      layer = nn.remat(layer, prevent_cse=False, policy=REMATERIALIZATION[self.rematerialization])
    self.layers = nn.scan(
      layer,
      variable_axes=_STACKED,
      split_rngs={"params": True, "dropout": True},
      in_axes=(0, nn.broadcast),
      length=config.num_hidden_layers,
    )(config, self.dtype, self.param_dtype, self.attention)
    self.norm = _norm(self)
    if not config.tie_word_embeddings:
      self.lm_head = nn.Dense(
        config.vocab_size,
        use_bias=False,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        kernel_init=_INIT,
        dot_general=_dot_float32,
      )

  def __call__(
    self,
    token_BxT: jax.Array,
    *,
    segment_BxT: jax.Array | None = None,
    position_BxT: jax.Array | None = None,
  ) -> jax.Array:
    """Computes the logits [B, T, V] float32 of the token after each position.

    Args:
      token_BxT: token ids.
      segment_BxT: segment numbers, 0 for padding. A token attends only to tokens of its own segment, so that
        several texts can share a row; an attention mask is a valid value, too. None if each row is one text
        with any padding on the right, where causality hides it from the text.
      position_BxT: position of each token in its text; None counts from 0 in each segment.
    """
    return self.unembed(self.features(token_BxT, segment_BxT=segment_BxT, position_BxT=position_BxT))

  def features(
    self,
    token_BxT: jax.Array,
    *,
    segment_BxT: jax.Array | None = None,
    position_BxT: jax.Array | None = None,
  ) -> jax.Array:
    """Computes the features [B, T, D] that `unembed` takes; for the arguments see `__call__`.

    It sows the output of each layer.
    """
    mask_Bx1xTxT = None
    if segment_BxT is not None:
      mask_Bx1xTxT = (segment_BxT[:, :, None] == segment_BxT[:, None, :])[:, None]
    if position_BxT is None:
      one_segment = jnp.zeros_like(token_BxT)
      position_BxT = segment_positions(one_segment if segment_BxT is None else segment_BxT)
    context = _Context(rotary_angles(position_BxT, self.config), mask_Bx1xTxT, None)
    x_BxTxD, _ = self._run_layers(token_BxT, context, None)
    return x_BxTxD

  def decode(self, token_BxT: jax.Array, valid_BxT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Continues the texts of a cache by T tokens each: a whole prompt, or one token.

    Args:
      token_BxT: token ids.
      valid_BxT: bool, False for padding, which takes a slot but is never attended to, so it may be anywhere.
      cache: cache with at least T free slots.

    Returns:
      Features [B, T, D] for `unembed`, and the cache.
    """
    seen_Bx1 = jnp.sum(cache.valid_BxS, axis=1, dtype=jnp.int32, keepdims=True)
    position_BxT = seen_Bx1 + jnp.cumsum(valid_BxT, axis=1, dtype=jnp.int32) - 1
    valid_BxS = lax.dynamic_update_slice(cache.valid_BxS, valid_BxT, (0, cache.length))
    slot_T = cache.length + jnp.arange(token_BxT.shape[1])
    causal_TxS = jnp.arange(valid_BxS.shape[1])[None, :] <= slot_T[:, None]
    mask_Bx1xTxS = (valid_BxS[:, None, :] & causal_TxS[None])[:, None]
    angles_BxTxR = rotary_angles(position_BxT.clip(0), self.config)
    context = _Context(angles_BxTxR, mask_Bx1xTxS, cache.length)
    x_BxTxD, (key, value) = self._run_layers(token_BxT, context, (cache.key_LxBxSxKxH, cache.value_LxBxSxKxH))
    return x_BxTxD, Cache(key, value, valid_BxS, cache.length + token_BxT.shape[1])

  def unembed(self, x_BxTxD: jax.Array) -> jax.Array:
    """Features [B, T, D] -> logits [B, T, V] float32."""
    if self.config.tie_word_embeddings:
      unembed, module = self._gathering(_unembed, "embed_tokens"), self.embed_tokens
    else:
      unembed, module = self._gathering(_call, "lm_head"), self.lm_head
    return unembed(module, x_BxTxD)

  def _run_layers(self, token_BxT, context, cache):
    layer_L = jnp.arange(self.config.num_hidden_layers)
    x_BxTxD = self._gathering(_call, "embed_tokens")(self.embed_tokens, token_BxT)
    (x_BxTxD, cache), _ = self.layers((x_BxTxD, cache), layer_L, context)
    return self.norm(x_BxTxD), cache

  def _gathering(self, target, name):
    """Wraps a module, or a function of a module, so that it first gathers the submodule's parameters."""
    if self.weights_axis is None or self.is_initializing():
      return target
    whole = _layer_shapes(self.config) if name == "layers" else _whole_shapes(self.config)[name]

    def gather(collections):
      return {"params": sharding.gather(collections["params"], whole, self.weights_axis)}

    return nn.map_variables(target, "params", gather)


def init_cache(config: LlamaConfig, rows: int, slots: int, dtype: Any) -> Cache:
  """An empty cache of `slots` tokens for each of `rows` texts."""
  shape = (config.num_hidden_layers, rows, slots, config.num_key_value_heads, config.head_dim)
  return Cache(
    jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((rows, slots), bool), jnp.zeros([], jnp.int32)
  )


def abstract_params(model: Llama) -> Any:
  """Shapes and dtypes of a model's parameters, as `jax.ShapeDtypeStruct`s."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


@functools.lru_cache
def _whole_shapes(config):
  """Shapes of the unsplit parameters; their dtypes are not used."""
  return abstract_params(Llama(config, parent=None))


@functools.lru_cache
def _layer_shapes(config):
  """Shapes of the unsplit parameters of one layer, as the loop over layers passes them."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), _whole_shapes(config)["layers"]
  )


def _call(module, x):
  return module(x)


def _unembed(embed, x_BxTxD):
  embedding_VxD = embed.embedding.astype(embed.dtype)
  return _dot_float32(x_BxTxD, embedding_VxD, (((x_BxTxD.ndim - 1,), (1,)), ((), ())))


# Products are accumulated and returned in float32, whatever the dtype of the operands.
_dot_float32 = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)


def _linear(module, features, name):
  return nn.Dense(
    features, use_bias=False, dtype=module.dtype, param_dtype=module.param_dtype, kernel_init=_INIT, name=name
  )


def _norm(module, name=None):
  return nn.RMSNorm(module.config.rms_norm_eps, dtype=module.dtype, param_dtype=module.param_dtype, name=name)
