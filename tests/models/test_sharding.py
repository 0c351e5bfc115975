"""Split weights compute what whole ones do, and are never whole all at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax import lax
from jax.sharding import PartitionSpec as P

from hamu_jax.errors import UserError
from hamu_jax.models import generation, llama, llama_config, llama_weights, lora, sharding

AXES = ("data", "weights")


def make_mesh(data, weights):
  return jax.sharding.Mesh(np.asarray(jax.devices()).reshape(data, weights), AXES)


def test_split_axes():
  config = llama_config.LlamaConfig(66, 24, 40, 4, 4, 2, 6)
  like = llama.abstract_params(llama.Llama(config))
  specs = traverse_util.flatten_dict(sharding.base_specs(like, make_mesh(1, 4)), sep="/")
  # 4 layers could be split in 4, but the loop takes them apart.
  assert specs["layers/mlp/down_proj/kernel"] == P(None, "weights")
  assert specs["layers/self_attn/q_proj/kernel"] == P(None, "weights")
  assert specs["layers/input_layernorm/scale"] == specs["norm/scale"] == P()
  # 66 tokens cannot, 24 features can.
  assert specs["embed_tokens/embedding"] == P(None, "weights")
  assert specs["lm_head/kernel"] == P("weights")
  odd = dataclasses.replace(config, vocab_size=67, hidden_size=25)
  like = llama.abstract_params(llama.Llama(odd))
  assert sharding.base_specs(like, make_mesh(1, 4))["embed_tokens"]["embedding"] == P()
  assert sharding.base_shardings(like, make_mesh(2, 2))["norm"]["scale"].mesh.shape["weights"] == 2


@pytest.fixture(params=["untied", "tied"])
def adapted(request, read_llama, golden):
  """A golden model with its output matrix or without, and an adapter."""
  return read_llama({"untied": "llama2_like", "tied": "gqa_tied"}[request.param], golden)


def _sums(model, spec, tokens, labels):
  """-> function: (adapter, base, rows [B], -1 for padding) -> summed loss and its gradient."""

  def loss(adapter, base, rows_B):
    apply = lora.with_lora(model.apply, spec)
    logits = apply({"params": base, "lora": adapter}, tokens[rows_B.clip(0)])
    label = labels[rows_B.clip(0), 1:]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), label.clip(0)[:, :, None], axis=2)[
      :, :, 0
    ]
    return -jnp.sum(jnp.where((label >= 0) & (rows_B >= 0)[:, None], picked, 0))

  return jax.value_and_grad(loss)


@pytest.mark.parametrize("data, weights, policy", [(1, 4, "full"), (2, 2, "dots")])
def test_loss_and_gradients_are_those_of_whole_weights(adapted, data, weights, policy):
  mesh = make_mesh(data, weights)
  texts = len(adapted.tokens)
  tokens = jnp.tile(adapted.tokens, (3, 1)) + jnp.arange(3).repeat(texts)[:, None]
  labels = jnp.tile(jnp.asarray(adapted.expected["labels"]), (3, 1))
  rows = np.full(12, -1, np.int32)
  rows[: 3 * texts] = np.arange(3 * texts)
  # Interleaved: the devices' rows are no blocks of the batch, and the padding is spread.
  own_indices = rows.reshape(3, 4).T.reshape(data, weights, 3)
  model = adapted.model.clone(rematerialization=policy)
  expected = jax.jit(_sums(model, adapted.lora, tokens, labels))(
    adapted.adapter, adapted.params, jnp.asarray(rows)
  )

  split = _sums(model.clone(weights_axis="weights"), adapted.lora, tokens, labels)

  def device_sums(adapter, base, rows):
    return lax.psum(split(adapter, base, rows[0, 0]), AXES)

  specs = sharding.base_specs(adapted.params, mesh)
  found = jax.jit(
    jax.shard_map(
      device_sums,
      mesh=mesh,
      in_specs=(P(), specs, P(*AXES)),
      out_specs=P(),
      check_vma=False,
    )
  )(
    adapted.adapter,
    jax.device_put(adapted.params, sharding.base_shardings(adapted.params, mesh)),
    own_indices,
  )
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  for path, leaf in traverse_util.flatten_dict(expected[1]).items():
    scale = np.abs(leaf).max()
    assert scale > 0
    np.testing.assert_allclose(traverse_util.flatten_dict(found[1])[path] / scale, leaf / scale, atol=1e-5)


def test_no_more_than_a_layer_is_whole():
  config = llama_config.LlamaConfig(64, 64, 256, 16, 4, 4, 16)
  mesh = make_mesh(1, 4)
  model = llama.Llama(config, rematerialization="full", weights_axis="weights")
  like = sharding.shard_like(llama.abstract_params(model), mesh)
  spec = lora.LoraConfig(rank=2)
  adapter = jax.eval_shape(lambda key: lora.init(key, spec, like), jax.random.key(0))
  tokens = jnp.zeros((1, 8), jnp.int32)
  step = jax.jit(
    jax.shard_map(
      lambda adapter, base: _sums(model, spec, tokens, tokens)(adapter, base, jnp.arange(1)),
      mesh=mesh,
      in_specs=(P(), sharding.base_specs(like, mesh)),
      out_specs=P(),
      check_vma=False,
    )
  )
  memory = step.lower(adapter, like).compile().memory_analysis()
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
  layer = size / config.num_hidden_layers
  adapter_size = sum(leaf.size * 4 for leaf in jax.tree.leaves(adapter))
  assert memory.argument_size_in_bytes < size / 4 + adapter_size + 0.1 * size
  # The gradients of the adapter are carried through the loop, old and new.
  assert memory.temp_size_in_bytes < 2 * adapter_size + 3 * layer


def test_whole_weights_need_no_mesh(tiny_llama):
  split = tiny_llama.model.clone(rematerialization="full", weights_axis="weights")
  np.testing.assert_array_equal(
    jax.jit(split.apply)({"params": tiny_llama.params}, tiny_llama.tokens),
    jax.jit(tiny_llama.model.apply)({"params": tiny_llama.params}, tiny_llama.tokens),
  )


def test_generation_from_split_weights(tiny_llama):
  """Outside `shard_map` the compiler divides the work: rows end at different times on no device."""
  mesh = make_mesh(1, 4)
  prompts = tiny_llama.tokens[jnp.arange(4) % len(tiny_llama.tokens), :8]
  valid = jnp.ones(prompts.shape, bool)
  greedy = generation.make_greedy(tiny_llama.model.apply, tiny_llama.config, new_tokens=6)
  params = jax.device_put(tiny_llama.params, sharding.base_shardings(tiny_llama.params, mesh))
  rows = jax.sharding.NamedSharding(mesh, P(AXES))
  found = greedy({"params": params}, *jax.device_put((prompts, valid), rows))
  expected = greedy({"params": tiny_llama.params}, prompts, valid)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_weights_load_into_their_parts(adapted):
  mesh = make_mesh(1, 4)
  folder = llama_weights.SafetensorsFolder(adapted.folder)
  shares = []

  class Recorded:
    """Notes which share of a tensor each read takes."""

    shapes = folder.shapes

    def read(self, name, index):
      part = folder.read(name, index)
      shares.append((name, part.size / np.prod(self.shapes[name])))
      return part

  like = sharding.shard_like(llama.abstract_params(adapted.model), mesh)
  params = llama_weights.load(Recorded(), like, adapted.config, where="golden")
  for name, share in shares:
    assert share == (1 if "norm" in name else 1 / 4)
  jax.tree.map(np.testing.assert_array_equal, params, adapted.params)
  kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
  layers, inputs, outputs = kernel.shape
  assert {shard.data.shape for shard in kernel.addressable_shards} == {(layers, inputs // 4, outputs)}


def test_what_would_keep_gathered_weights_is_refused(tiny_llama):
  with pytest.raises(UserError, match="rematerialization='none'.*choose 'dots' or 'full'"):
    tiny_llama.model.clone(weights_axis="weights")
