"""Greedy generation: all prompts in one pass, then token by token with a cache of keys and values.

Shapes: B prompts, P tokens of the longest prompt, N new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hamu_jax.errors import UserError
from hamu_jax.models import llama
from hamu_jax.models.llama_config import LlamaConfig


class Generated(NamedTuple):
  """Continuations.

  Attributes:
    token_BxN: int32 tokens up to the end-of-text token, which is included, then padding.
    length_B: int32 number of tokens before the padding.
  """

  token_BxN: jax.Array
  length_B: jax.Array


class _Progress(NamedTuple):
  """State of the generation loop; `done_B` marks texts that have ended."""

  step: jax.Array
  done_B: jax.Array
  token_BxN: jax.Array
  cache: llama.Cache


def make_greedy(
  apply: Callable[..., Any],
  config: LlamaConfig,
  *,
  new_tokens: int,
  dtype: Any = jnp.float32,
  eos_token_ids: Sequence[int] | None = None,
  pad_token_id: int = 0,
) -> Callable[[Any, jax.Array, jax.Array], Generated]:
  """Builds a jitted function that continues prompts by greedy decoding.

  It stops when every text has ended. One compilation serves all batches of one shape.

  Args:
    apply: `Llama.apply`, or `lora.with_lora` of it.
    config: configuration of the model.
    new_tokens: N, largest number of tokens of a continuation.
    dtype: type of the cache; give the model's.
    eos_token_ids: tokens that end a text; None takes the configuration's.
    pad_token_id: token that fills a text after its end.

  Returns:
    (variables, token_BxP, valid_BxP bool) -> Generated. Padding may be on either side; each prompt
    needs at least one token.

  Raises:
    UserError: for `new_tokens` below 1. The function raises it for prompts that leave no room for them.
  """
  if new_tokens < 1:
    raise UserError(f"new_tokens={new_tokens}: choose 1 or more")
  ends = jnp.asarray(config.eos_token_ids if eos_token_ids is None else eos_token_ids, jnp.int32)

  @jax.jit
  def greedy(variables, token_BxP, valid_BxP):
    rows, prompt = token_BxP.shape
    _check_room(prompt, new_tokens, config)
    valid_BxP = valid_BxP.astype(bool)
    # The last new token is never fed back.
    cache = llama.init_cache(config, rows, prompt + new_tokens - 1, dtype)
    x_BxPxD, cache = apply(variables, token_BxP, valid_BxP, cache, method="decode")
    last_B = prompt - 1 - jnp.argmax(valid_BxP[:, ::-1], axis=1)

    def unfinished(progress):
      return (progress.step < new_tokens) & ~jnp.all(progress.done_B)

    def advance(progress):
      token_Bx1 = lax.dynamic_slice_in_dim(progress.token_BxN, progress.step - 1, 1, axis=1)
      x_Bx1xD, cache = apply(variables, token_Bx1, jnp.ones((rows, 1), bool), progress.cache, method="decode")
      token_B = _pick(apply, variables, x_Bx1xD[:, 0])
      return _append(progress._replace(cache=cache), token_B, ends, pad_token_id)

    first_B = _pick(apply, variables, x_BxPxD[jnp.arange(rows), last_B])
    start = _append(_start(cache, new_tokens, pad_token_id), first_B, ends, pad_token_id)
    progress = lax.while_loop(unfinished, advance, start)
    return _generated(progress, ends)

  return greedy


def _check_room(prompt: int, new_tokens: int, config: LlamaConfig) -> None:
  """Refuses prompts after which the new tokens do not fit."""
  if prompt + new_tokens > config.max_position_embeddings:
    raise UserError(
      f"prompts of {prompt} tokens and {new_tokens} new ones exceed the model's context of "
      f"{config.max_position_embeddings} tokens; shorten either"
    )


def _pick(apply, variables, x_BxD: jax.Array) -> jax.Array:
  """The most likely tokens, int32 [B]."""
  logits_Bx1xV = apply(variables, x_BxD[:, None], method="unembed")
  return jnp.argmax(logits_Bx1xV[:, 0], axis=-1).astype(jnp.int32)


def _start(cache: llama.Cache, new_tokens: int, pad_token_id: int) -> _Progress:
  """State of the loop before the first token is generated."""
  rows = cache.valid_BxS.shape[0]
  return _Progress(
    step=jnp.zeros([], jnp.int32),
    done_B=jnp.zeros(rows, bool),
    token_BxN=jnp.full((rows, new_tokens), pad_token_id, jnp.int32),
    cache=cache,
  )


def _append(progress: _Progress, token_B: jax.Array, ends: jax.Array, pad_token_id: int) -> _Progress:
  """Appends a token to each text that has not ended."""
  token_B = jnp.where(progress.done_B, pad_token_id, token_B)
  ended_B = jnp.any(token_B[:, None] == ends[None], axis=1)
  return progress._replace(
    step=progress.step + 1,
    done_B=progress.done_B | ended_B,
    token_BxN=progress.token_BxN.at[:, progress.step].set(token_B),
  )


def _generated(progress: _Progress, ends: jax.Array) -> Generated:
  """The continuations with their lengths, up to the first token that ends them."""
  ended_BxN = jnp.any(progress.token_BxN[:, :, None] == ends[None, None], axis=2)
  length_B = jnp.where(jnp.any(ended_BxN, axis=1), jnp.argmax(ended_BxN, axis=1) + 1, progress.step)
  return Generated(progress.token_BxN, length_B.astype(jnp.int32))
