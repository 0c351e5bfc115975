"""Llama against transformers' numbers, and properties that no numbers show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.errors import UserError
from hamu_jax.models import llama


def test_logits_and_loss(any_llama, check_logits, answer_losses):
  logits = jax.jit(any_llama.model.apply)({"params": any_llama.params}, any_llama.tokens)
  check_logits(logits, any_llama.expected["logits"], any_llama.mask)
  _, loss = answer_losses(logits, jnp.asarray(any_llama.expected["labels"]))
  np.testing.assert_allclose(loss, any_llama.expected["loss"], rtol=0, atol=2e-4)


def test_no_token_sees_a_later_one(tiny_llama):
  # Distinct tokens, so that a row of the embedding stands for a position.
  tokens = jnp.asarray(np.random.default_rng(0).permutation(256)[None, :6])

  @jax.jit
  def influence(position):
    """Largest gradient of the logits at a position by each input's embedding."""

    def total(embedding):
      params = tiny_llama.params | {"embed_tokens": {"embedding": embedding}}
      logits = tiny_llama.model.apply({"params": params}, tokens)
      return jnp.sum(jnp.take(logits[0], position, axis=0) ** 2)

    gradient = jax.grad(total)(tiny_llama.params["embed_tokens"]["embedding"])
    return jnp.max(jnp.abs(gradient[tokens[0]]), axis=1)

  seen = np.stack([influence(position) for position in range(6)])
  assert np.all(seen[np.tril_indices(6)] > 1e-6)
  assert not np.any(seen[np.triu_indices(6, 1)])


def _pack(rows, length):
  """Texts one after the other in one row, then padding: tokens, labels, segments."""
  packed = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
  segments = np.repeat(np.arange(1, len(rows) + 1), [len(row[0]) for row in rows])
  rest = (0, length - len(segments))
  return [
    jnp.asarray(np.pad(values, rest, constant_values=fill)[None])
    for values, fill in zip((*packed, segments), (0, -100, 0), strict=True)
  ]


def test_a_texts_loss_depends_on_nothing_else_in_the_batch(tiny_llama, answer_losses):
  expected = tiny_llama.expected
  lengths = expected["attention_mask"].sum(1)
  texts = [(expected["input_ids"][i, :n], expected["labels"][i, :n]) for i, n in enumerate(lengths)]

  @jax.jit
  def losses(tokens, labels, segments):
    logits = tiny_llama.model.apply({"params": tiny_llama.params}, tokens, segment_BxT=segments)
    return answer_losses(logits, labels)[0]

  alone = np.array(
    [losses(*(jnp.asarray(part)[None] for part in (*text, np.ones(len(text[0]), int))))[0] for text in texts]
  )

  def batch(order, left):
    rows = []
    for i in order:
      pad = (40 - lengths[i], 0) if left else (0, 40 - lengths[i])
      rows.append(
        [
          np.pad(part, pad, constant_values=fill)
          for part, fill in zip((*texts[i], np.ones(lengths[i], int)), (0, -100, 0), strict=True)
        ]
      )
    return [jnp.asarray(np.stack(parts)) for parts in zip(*rows, strict=True)]

  for order, left in (((0, 1, 2), False), ((2, 0, 1), False), ((1, 2, 0), True)):
    np.testing.assert_allclose(losses(*batch(order, left)), alone[list(order)], atol=2e-6)

  # Packed, each text's labels are counted by themselves. The first label of a text has no token
  # before it that could predict it, and is none.
  for order in ((0, 1, 2), (1, 2, 0)):
    tokens, labels, segments = _pack([texts[i] for i in order], 64)
    for number, i in enumerate(order, 1):
      own = jnp.where(segments == number, labels, -100)
      np.testing.assert_allclose(losses(tokens, own, segments)[0], alone[i], atol=2e-6)


def test_right_padding_needs_no_segments(tiny_llama):
  apply = jax.jit(tiny_llama.model.apply)
  variables, mask = {"params": tiny_llama.params}, tiny_llama.mask
  with_segments = apply(variables, tiny_llama.tokens, segment_BxT=mask)
  valid = np.asarray(mask) == 1
  np.testing.assert_allclose(
    np.asarray(apply(variables, tiny_llama.tokens))[valid], np.asarray(with_segments)[valid], atol=2e-6
  )


def test_attention_depends_on_distances_only(tiny_llama):
  apply = jax.jit(tiny_llama.model.apply)
  variables = {"params": tiny_llama.params}
  positions = jnp.broadcast_to(jnp.arange(24), tiny_llama.tokens.shape)
  at_start = apply(variables, tiny_llama.tokens, position_BxT=positions)
  np.testing.assert_allclose(
    apply(variables, tiny_llama.tokens, position_BxT=positions + 100), at_start, atol=1e-4
  )
  stretched = apply(variables, tiny_llama.tokens, position_BxT=2 * positions)
  assert np.max(np.abs(stretched - at_start)) > 1e-2


@pytest.mark.parametrize("policy", ["dots", "full"])
def test_rematerialization_saves_memory_and_changes_nothing(tiny_llama, policy):
  tokens = jnp.tile(tiny_llama.tokens, (4, 2))

  def compiled(rematerialization):
    model = tiny_llama.model.clone(rematerialization=rematerialization)

    def total(params):
      return jnp.mean(model.apply({"params": params}, tokens) ** 2)

    return jax.jit(jax.grad(total)).lower(tiny_llama.params).compile()

  kept, again = compiled("none"), compiled(policy)
  for left, right in zip(*(jax.tree.leaves(step(tiny_llama.params)) for step in (kept, again)), strict=True):
    np.testing.assert_allclose(left, right, atol=1e-6)
  memory = [step.memory_analysis().temp_size_in_bytes for step in (kept, again)]
  assert memory[1] < 0.9 * memory[0]


def test_sixteen_bits(tiny_llama, check_logits):
  model = tiny_llama.model.clone(dtype=jnp.bfloat16)
  logits = jax.jit(model.apply)({"params": tiny_llama.params}, tiny_llama.tokens)
  assert logits.dtype == jnp.float32
  # The logits themselves are not rounded to 8 bits.
  assert np.mean(np.asarray(logits.astype(jnp.bfloat16), np.float32) == logits) < 0.1
  stored, valid = tiny_llama.expected["logits"], np.asarray(tiny_llama.mask) == 1
  error = np.asarray(logits)[:, :, ::4][valid] - stored[valid]
  assert np.max(np.abs(error)) < 0.05
  features = jax.eval_shape(
    lambda tokens: model.apply({"params": tiny_llama.params}, tokens, method="features"), tiny_llama.tokens
  )
  assert features.dtype == jnp.bfloat16


def test_hidden_states_of_each_layer(tiny_llama):
  apply = jax.jit(tiny_llama.model.apply, static_argnames=("mutable", "method"))
  features, sown = apply(
    {"params": tiny_llama.params}, tiny_llama.tokens, mutable=("intermediates",), method="features"
  )
  (hidden_LxBxTxD,) = sown["intermediates"]["layers"]["hidden"]

  def normalized(x):
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    scale = np.asarray(tiny_llama.params["norm"]["scale"]).reshape(1, 1, -1)
    return x / np.sqrt(mean_square + tiny_llama.config.rms_norm_eps) * scale

  np.testing.assert_allclose(normalized(hidden_LxBxTxD[1]), features, atol=1e-5)
  # The model that ends after its first layer.
  model = llama.Llama(dataclasses.replace(tiny_llama.config, num_hidden_layers=1))
  first = tiny_llama.params | {"layers": jax.tree.map(lambda leaf: leaf[:1], tiny_llama.params["layers"])}
  np.testing.assert_allclose(
    normalized(hidden_LxBxTxD[0]),
    jax.jit(model.apply, static_argnames="method")({"params": first}, tiny_llama.tokens, method="features"),
    atol=1e-5,
  )


def test_initial_weights(tiny_llama):
  init = jax.jit(tiny_llama.model.init)(jax.random.key(0), tiny_llama.tokens)["params"]
  for path in (("layers", "mlp", "up_proj"), ("layers", "self_attn", "o_proj"), ("lm_head",)):
    kernel = init
    for name in path:
      kernel = kernel[name]
    np.testing.assert_allclose(np.std(kernel["kernel"]), 0.02, rtol=0.05)
  up = init["layers"]["mlp"]["up_proj"]["kernel"]
  assert not np.any(up[0] == up[1])
  assert np.all(init["norm"]["scale"] == 1)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"rematerialization": "some"}, "rematerialization='some': choose from none, dots, full"),
    ({"attention": "flash"}, "attention='flash': choose from xla, cudnn"),
    ({"attention": "cudnn"}, "16 bits, not in float32"),
  ],
)
def test_options_that_do_not_exist(tiny_llama, options, message):
  with pytest.raises(UserError, match=message):
    llama.Llama(tiny_llama.config, **options)
