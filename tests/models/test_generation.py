"""Greedy generation against transformers' tokens and against generation without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.errors import UserError
from hamu_jax.models import generation, llama, lora

_PROMPT = 8


def _batch(prompts, width, left):
  """Prompts of several lengths in one array, and which of it is no padding."""
  tokens = np.zeros((len(prompts), width), np.int32)
  for row, prompt in enumerate(prompts):
    start = width - len(prompt) if left else 0
    tokens[row, start : start + len(prompt)] = prompt
  lengths = np.array([[len(prompt)] for prompt in prompts])
  index = np.arange(width)[None]
  valid = index >= width - lengths if left else index < lengths
  return jnp.asarray(tokens), jnp.asarray(valid)


def test_continuations(any_llama):
  expected = any_llama.expected["greedy"][0]
  greedy = generation.make_greedy(any_llama.model.apply, any_llama.config, new_tokens=16)
  other = any_llama.expected["input_ids"][0, :11]
  variables = {"params": any_llama.params}
  first, second = (
    greedy(variables, *_batch([expected[:_PROMPT], other], 12, left)) for left in (False, True)
  )
  np.testing.assert_array_equal(first.token_BxN[0], expected[_PROMPT:])
  np.testing.assert_array_equal(first.token_BxN, second.token_BxN)
  np.testing.assert_array_equal(first.length_B, [16, 16])
  assert greedy._cache_size() == 1


def test_with_an_adapter_as_without_a_cache(tiny_llama):
  apply = lora.with_lora(tiny_llama.model.apply, tiny_llama.lora)
  prompts = [tiny_llama.expected["input_ids"][i, :n] for i, n in enumerate((5, 9, 1))]
  greedy = generation.make_greedy(apply, tiny_llama.config, new_tokens=6, eos_token_ids=())
  tokens, valid = _batch(prompts, 9, left=True)
  generated = greedy(tiny_llama.variables, tokens, valid)
  logits = jax.jit(lambda tokens: apply(tiny_llama.variables, tokens))
  for prompt, continuation in zip(prompts, generated.token_BxN, strict=True):
    text = list(prompt)
    for _ in range(6):
      padded = jnp.asarray(np.pad(text, (0, 15 - len(text)))[None])
      text.append(int(np.argmax(logits(padded)[0, len(text) - 1])))
    np.testing.assert_array_equal(continuation, text[len(prompt) :])


def test_a_prompt_in_pieces_gives_the_same_features(tiny_llama):
  """The cache may be filled by any number of tokens at a time."""
  apply = jax.jit(tiny_llama.model.apply, static_argnames="method")
  variables, tokens = {"params": tiny_llama.params}, tiny_llama.tokens[:1]
  whole = apply(variables, tokens, method="features")
  cache = llama.init_cache(tiny_llama.config, 1, 30, jnp.float32)
  pieces = []
  for start, end in ((0, 10), (10, 11), (11, 24)):
    valid = jnp.ones((1, end - start), bool)
    piece, cache = apply(variables, tokens[:, start:end], valid, cache, method="decode")
    pieces.append(piece)
  np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-5)
  assert int(cache.length) == 24


def test_it_stops_when_all_texts_have_ended(tiny_llama):
  calls = []

  def apply(variables, *args, method):
    jax.debug.callback(lambda: calls.append(method))
    return tiny_llama.model.apply(variables, *args, method=method)

  # transformers goes on by 114, 30, 27, 58, ...
  prompt = tiny_llama.expected["greedy"][0, :_PROMPT]
  greedy = generation.make_greedy(
    apply, tiny_llama.config, new_tokens=10, eos_token_ids=(27, 30), pad_token_id=9
  )
  generated = greedy({"params": tiny_llama.params}, *_batch([prompt], _PROMPT, False))
  np.testing.assert_array_equal(generated.token_BxN, [[114, 30] + 8 * [9]])
  np.testing.assert_array_equal(generated.length_B, [2])
  jax.effects_barrier()
  assert sorted(calls) == 2 * ["decode"] + 2 * ["unembed"]


def test_an_ended_text_does_not_disturb_the_others(tiny_llama):
  prompts = [tiny_llama.expected["greedy"][0, :_PROMPT], tiny_llama.expected["input_ids"][0, :5]]
  variables = {"params": tiny_llama.params}

  def generate(ends):
    greedy = generation.make_greedy(
      tiny_llama.model.apply, tiny_llama.config, new_tokens=8, eos_token_ids=ends
    )
    return greedy(variables, *_batch(prompts, _PROMPT, True))

  free = generate(())
  ended = generate((114,))
  assert 114 not in np.asarray(free.token_BxN[1])
  np.testing.assert_array_equal(ended.token_BxN[0], [114] + 7 * [0])
  np.testing.assert_array_equal(ended.token_BxN[1], free.token_BxN[1])
  np.testing.assert_array_equal(ended.length_B, [1, 8])


def test_lengths_that_do_not_fit(tiny_llama):
  with pytest.raises(UserError, match="new_tokens=0: choose 1 or more"):
    generation.make_greedy(tiny_llama.model.apply, tiny_llama.config, new_tokens=0)
  greedy = generation.make_greedy(tiny_llama.model.apply, tiny_llama.config, new_tokens=500)
  with pytest.raises(UserError, match="13 tokens and 500 new ones exceed .* context of 512"):
    greedy({"params": tiny_llama.params}, *_batch([[1] * 13], 13, False))
