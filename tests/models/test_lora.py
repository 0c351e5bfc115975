"""LoRA against PEFT's numbers, and what its dropout must and must not depend on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.errors import UserError
from hamu_jax.models import lora


def test_logits_loss_and_gradients(any_llama, check_logits, answer_losses):
  apply = lora.with_lora(any_llama.model.apply, any_llama.lora)
  labels = jnp.asarray(any_llama.expected["labels"])

  @jax.jit
  def step(adapter):
    def objective(adapter):
      logits = apply({"params": any_llama.params, "lora": adapter}, any_llama.tokens)
      return answer_losses(logits, labels)[1], logits

    return jax.value_and_grad(objective, has_aux=True)(adapter)

  (loss, logits), gradient = step(any_llama.adapter)
  check_logits(logits, any_llama.expected["lora_logits"], any_llama.mask)
  np.testing.assert_allclose(loss, any_llama.expected["lora_loss"], rtol=0, atol=2e-4)
  checked = 0
  for name, expected in any_llama.expected.items():
    if name.startswith("grad/"):
      layer, part, projection, factor = name.split(".")[4:8]
      ours = gradient["layers"][part][projection][factor][int(layer)]
      np.testing.assert_allclose(ours.T, expected, rtol=0, atol=2e-6)
      checked += 1
  assert checked == 4


def test_without_its_values_it_is_the_base_model(tiny_llama, check_logits):
  apply = jax.jit(lora.with_lora(tiny_llama.model.apply, tiny_llama.lora))
  logits = apply({"params": tiny_llama.params}, tiny_llama.tokens)
  check_logits(logits, tiny_llama.expected["logits"], tiny_llama.mask)


def test_a_merged_model_is_plain(any_llama, check_logits):
  merged = lora.merge(any_llama.params, any_llama.adapter, any_llama.lora)
  logits = jax.jit(any_llama.model.apply)({"params": merged}, any_llama.tokens)
  check_logits(logits, any_llama.expected["lora_logits"], any_llama.mask)


def test_merging_in_sixteen_bits_rounds_once(tiny_llama):
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_llama.params)
  merged = lora.merge(params, tiny_llama.adapter, tiny_llama.lora)
  kernel = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"], np.float64)
  factors = tiny_llama.adapter["layers"]["mlp"]["up_proj"]
  exact = kernel + 2 * np.einsum("lir,lro->lio", factors["lora_A"], factors["lora_B"])
  ours = merged["layers"]["mlp"]["up_proj"]["kernel"]
  assert ours.dtype == jnp.bfloat16
  # Half a unit in the last of eight places.
  np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=2**-8, atol=1e-9)


def test_initial_values(tiny_llama):
  config = lora.LoraConfig(rank=16, targets=("q_proj", "mlp.down_proj"))
  adapter = lora.init(jax.random.key(0), config, tiny_llama.params)
  assert set(adapter["layers"]["self_attn"]) == {"q_proj"}
  assert set(adapter["layers"]["mlp"]) == {"down_proj"}
  # PEFT: kaiming_uniform_(a=sqrt(5)), which is uniform in +-1 / sqrt(inputs).
  for factors, inputs in (
    (adapter["layers"]["self_attn"]["q_proj"], 64),
    (adapter["layers"]["mlp"]["down_proj"], 112),
  ):
    a = factors["lora_A"]
    assert a.shape == (2, inputs, 16)
    assert 0.98 * inputs**-0.5 < np.max(np.abs(a)) <= inputs**-0.5
    np.testing.assert_allclose(np.std(a), (3 * inputs) ** -0.5, rtol=0.05)
    assert not np.any(factors["lora_B"])
    assert factors["lora_B"].shape == (2, 16, 64)


def test_layers_as_tensors_of_their_own(tiny_llama):
  head = {"lm_head": {"lora_A": np.ones((64, 4)), "lora_B": np.ones((4, 256))}}
  adapter = tiny_llama.adapter | head
  split = lora.unstack(adapter)
  assert set(split["layers"]) == {"0", "1"}
  for layer in (0, 1):
    np.testing.assert_array_equal(
      split["layers"][str(layer)]["mlp"]["up_proj"]["lora_A"],
      adapter["layers"]["mlp"]["up_proj"]["lora_A"][layer],
    )
  assert split["lm_head"] is adapter["lm_head"]
  jax.tree.map(np.testing.assert_array_equal, lora.stack(split), adapter)
  assert lora.stack(lora.unstack(head)) == head


def test_an_output_matrix_may_be_adapted(tiny_llama):
  config = lora.LoraConfig(rank=2, alpha=6, targets=("lm_head",))
  adapter = lora.init(jax.random.key(0), config, tiny_llama.params)
  adapter["lm_head"]["lora_B"] = jnp.ones_like(adapter["lm_head"]["lora_B"])
  apply = jax.jit(lora.with_lora(tiny_llama.model.apply, config), static_argnames="method")
  features = jnp.ones((1, 1, 64))
  base, adapted = (
    apply({"params": tiny_llama.params, **extra}, features, method="unembed")
    for extra in ({}, {"lora": adapter})
  )
  change = 3 * np.sum(adapter["lm_head"]["lora_A"])
  np.testing.assert_allclose(adapted - base, np.full((1, 1, 256), change), rtol=1e-3)


class _Twice(nn.Module):
  """Two linear layers of the same inputs."""

  features: int

  @nn.compact
  def __call__(self, carry, _):
    outputs = [nn.Dense(self.features, use_bias=False, name=name)(carry) for name in "ab"]
    return carry, jnp.stack(outputs)


def _dropped(key, tokens, features, rate=0.25):
  """What the adapters of two layers of two such pairs see of an input of ones, [2, 2, B, T, F]."""
  scan = nn.scan(
    _Twice, variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True, "dropout": True}, length=2
  )
  layers = scan(features, parent=None)
  identity = jnp.tile(jnp.eye(features)[None], (2, 1, 1))
  variables = {
    "params": {name: {"kernel": jnp.zeros((2, features, features))} for name in "ab"},
    "lora": {name: {"lora_A": identity, "lora_B": identity} for name in "ab"},
  }
  config = lora.LoraConfig(rank=features, alpha=features, dropout=rate)
  apply = lora.with_lora(layers.apply, config, tokens)
  ones = jnp.ones((*tokens.example_BxT.shape, features))
  return np.asarray(apply(variables, ones, None, rngs={"dropout": key})[1])


def _tokens(examples, positions):
  return lora.Tokens(jnp.asarray(examples), jnp.asarray(positions))


def test_dropout_keeps_the_mean():
  tokens = _tokens(np.repeat(np.arange(8)[:, None], 16, 1), np.tile(np.arange(16), (8, 1)))
  seen = _dropped(jax.random.key(0), tokens, 32)
  np.testing.assert_allclose(np.unique(seen), [0, 4 / 3], rtol=1e-6)
  # 16384 draws: three standard deviations are 0.01.
  np.testing.assert_allclose(np.mean(seen > 0), 0.75, atol=0.011)
  # Layers, projections, examples, positions and steps draw independently: equal in 10 of 16 cases.
  again = _dropped(jax.random.key(1), tokens, 32)
  for left, right in (
    (seen[0], seen[1]),
    (seen[:, 0], seen[:, 1]),
    (seen[:, :, 0], seen[:, :, 1]),
    (seen[..., 0, :], seen[..., 1, :]),
    (seen, again),
  ):
    np.testing.assert_allclose(np.mean(left == right), 0.625, atol=0.06)


def test_dropout_goes_by_example_and_position_alone():
  key = jax.random.key(0)
  first = _dropped(key, _tokens([[7, 7, 7, 0, 0]], [[0, 1, 2, 0, 0]]), 8)
  second = _dropped(key, _tokens([[9, 9, 9, 9, 0]], [[0, 1, 2, 3, 0]]), 8)
  packed = _dropped(key, _tokens([[0] * 7, [9, 9, 9, 9, 7, 7, 7]], [[0] * 7, [0, 1, 2, 3, 0, 1, 2]]), 8)
  np.testing.assert_array_equal(packed[..., 1, :4, :], second[..., 0, :4, :])
  np.testing.assert_array_equal(packed[..., 1, 4:, :], first[..., 0, :3, :])


def test_dropout_in_the_model(tiny_llama):
  config = lora.LoraConfig(rank=4, alpha=8, dropout=0.5)
  positions = jnp.broadcast_to(jnp.arange(24), (3, 24))

  def program(rematerialization):
    model = tiny_llama.model.clone(rematerialization=rematerialization)

    @jax.jit
    def logits(examples, rows):
      tokens = lora.Tokens(jnp.broadcast_to(examples[:, None], (3, 24)), positions)
      return lora.with_lora(model.apply, config, tokens)(
        tiny_llama.variables, tiny_llama.tokens[rows], rngs={"dropout": jax.random.key(3)}
      )

    return logits

  logits, again = program("none"), program("full")
  rows, other = jnp.arange(3), jnp.asarray([2, 0, 1])
  some = logits(rows, rows)
  np.testing.assert_allclose(logits(other, other), some[other], atol=2e-6)
  np.testing.assert_allclose(again(rows, rows), some, atol=2e-6)
  assert np.max(np.abs(some[:, :, ::4] - tiny_llama.expected["lora_logits"])) > 1e-2
  assert np.max(np.abs(some - logits(rows + 10, rows))) > 1e-2


def test_only_the_adapter_moves_under_jit_and_sharding(tiny_llama):
  mesh = jax.sharding.Mesh(jax.devices(), ("model",))
  spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "model"))

  def place(leaf):
    return jax.device_put(leaf, spec) if leaf.ndim == 3 else leaf

  apply = lora.with_lora(tiny_llama.model.apply, tiny_llama.lora)

  @jax.jit
  def gradient(adapter, params):
    def total(adapter):
      return jnp.mean(apply({"params": params, "lora": adapter}, tiny_llama.tokens) ** 2)

    return jax.grad(total)(adapter)

  whole = gradient(tiny_llama.adapter, tiny_llama.params)
  divided = gradient(tiny_llama.adapter, jax.tree.map(place, tiny_llama.params))
  assert jax.tree.structure(whole) == jax.tree.structure(tiny_llama.adapter)
  for left, right in zip(*map(jax.tree.leaves, (whole, divided)), strict=True):
    np.testing.assert_allclose(left, right, atol=1e-6)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"rank": 0}, "lora rank=0: choose 1 or more"),
    ({"dropout": 1.0}, r"lora dropout=1.0: choose a share in \[0, 1\)"),
    ({"targets": ("q_proj", "qkv")}, "target 'qkv' is not a linear layer.*choose from down_proj, "),
  ],
)
def test_adapters_that_cannot_be(tiny_llama, options, message):
  with pytest.raises(UserError, match=message):
    lora.init(jax.random.key(0), lora.LoraConfig(**options), tiny_llama.params)
