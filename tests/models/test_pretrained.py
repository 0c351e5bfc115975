"""Models from folders, GGUF files, the hub and a seed: what is read when, and what tells them apart."""

import dataclasses
import json
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from hamu_jax.errors import UserError
from hamu_jax.models import llama, llama_config, llama_gguf, pretrained, sharding, tokenizer

_WORDS = ("<s>", "</s>", "who", "wrote", "it", "nobody")


@pytest.fixture
def folder(tiny_llama, tmp_path):
  """A golden Llama with a tokenizer of six words."""
  target = tmp_path / "model"
  target.mkdir()
  for name in ("config.json", "model.safetensors"):
    shutil.copy(tiny_llama.folder / name, target / name)
  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="it")
  )
  words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  words.save(str(target / "tokenizer.json"))
  (target / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
  )
  return target


def open_model(path="", preset="tiny", seed=0):
  return pretrained.open_model(str(path), preset=preset, seed=seed)


def abstract(config, **options):
  return llama.abstract_params(llama.Llama(config, **options))


def assert_same(got, wanted):
  jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_a_folder(folder, tiny_llama):
  model = open_model(folder)
  assert model.config == tiny_llama.config and model.name == str(folder)
  assert model.tokenizer.encode("who wrote it") == [2, 3, 4]
  assert_same(model.load(abstract(model.config)), tiny_llama.params)


def test_a_trained_head_beside_a_tied_configuration(read_llama, golden, folder):
  """Merged models keep `tie_word_embeddings` though their head was trained; transformers takes the head."""
  case = read_llama("gqa_tied", golden)
  shutil.copy(case.folder / "config.json", folder)
  tensors = safetensors.numpy.load_file(case.folder / "model.safetensors")
  embedding = tensors["model.embed_tokens.weight"]
  for head, tied in ((embedding, True), (embedding[::-1], False)):
    tensors["lm_head.weight"] = np.ascontiguousarray(head)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    model = open_model(folder)
    assert model.config == dataclasses.replace(case.config, tie_word_embeddings=tied)
  params = model.load(abstract(model.config))
  np.testing.assert_array_equal(params["lm_head"]["kernel"], head.T)
  assert_same({name: params[name] for name in case.params}, case.params)


def test_a_name_of_the_hub(folder, tiny_llama, monkeypatch):
  monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(folder))
  model = open_model("someone/tiny-llama")
  # What others find the base of an adapter by.
  assert model.name == "someone/tiny-llama"
  assert model.fingerprint == open_model(folder).fingerprint
  assert_same(model.load(abstract(model.config)), tiny_llama.params)


def test_nothing_is_loaded_before_it_is_asked_for(folder):
  model = open_model(folder)
  (folder / "model.safetensors").write_bytes(b"cut off")
  with pytest.raises(UserError, match="model.safetensors"):
    model.load(abstract(model.config))


@pytest.mark.parametrize(
  "missing, message",
  [
    ("config.json", "config.json: cannot be read"),
    ("tokenizer.json", "tokenizer"),
  ],
)
def test_a_folder_that_lacks_a_file(folder, missing, message):
  (folder / missing).unlink()
  with pytest.raises(UserError, match=message) as error:
    open_model(folder)
  assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_copy_is_the_same_model_and_any_change_makes_another(folder, tmp_path):
  own = open_model(folder).fingerprint
  copy = shutil.copytree(folder, tmp_path / "copy")
  assert open_model(copy).fingerprint == own
  weights = (copy / "model.safetensors").read_bytes()
  seen = {own}
  for at in (len(weights) // 3, len(weights) // 2, len(weights) - 1):
    changed = bytearray(weights)
    changed[at] ^= 1
    (copy / "model.safetensors").write_bytes(changed)
    seen.add(open_model(copy).fingerprint)
  (copy / "model.safetensors").write_bytes(weights)
  values = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 2e-6}))
  seen.add(open_model(copy).fingerprint)
  assert len(seen) == 5


def test_of_large_files_pieces_in_all_parts_count(tmp_path, monkeypatch):
  monkeypatch.setattr(pretrained, "_PIECE_BYTES", 16)
  file = tmp_path / "weights"
  content = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8)
  content.tofile(file)
  seen = {pretrained._fingerprint([file])}
  # A tensor of a thousandth of it, wherever it is; the file has 512 pieces.
  for start in range(0, 100_000, 12_345):
    changed = content.copy()
    changed[start : start + 250] += 1
    changed.tofile(file)
    seen.add(pretrained._fingerprint([file]))
  assert len(seen) == 10
  np.concatenate([content, content[:1]]).tofile(file)
  assert pretrained._fingerprint([file]) not in seen


def test_a_gguf_file(tmp_path, monkeypatch):
  config = llama_config.PRESETS["tiny"]

  class File:
    path = tmp_path / "tiny.gguf"

    def __init__(self, path, reader):
      assert reader == "reader"
      assert path == str(self.path) or path == self.path
      self.config = config

  File.path.write_bytes(b"GGUF and weights")
  monkeypatch.setattr(llama_gguf, "GGUFFile", File)
  monkeypatch.setattr(llama_gguf, "smollm2_path", lambda: File.path)
  monkeypatch.setattr(llama_gguf, "load_file", lambda file, like: (file.config, like))
  words = tokenizer.byte_tokenizer()
  monkeypatch.setattr(llama_gguf, "open_reader", lambda path: "reader")
  monkeypatch.setattr(
    tokenizer, "from_gguf", lambda path, reader: words if (path, reader) == (File.path, "reader") else None
  )
  model, packaged = open_model(File.path), open_model("smollm2")
  assert model.config is packaged.config is config and model.tokenizer is words
  assert model.load("shapes") == (config, "shapes")
  assert (model.name, packaged.name) == (str(File.path), "smollm2")
  assert model.fingerprint == packaged.fingerprint
  File.path.write_bytes(b"GGUF and weightz")
  assert open_model("smollm2").fingerprint != packaged.fingerprint


def test_random_weights_go_by_the_seed():
  model, other = open_model(seed=0), open_model(seed=1)
  assert model.config == llama_config.PRESETS["tiny"] and model.name == ""
  assert model.tokenizer.vocab_size <= model.config.vocab_size
  like = abstract(model.config)
  params = model.load(like)
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), like
  )
  assert_same(open_model(seed=0).load(like), params)
  kernels = [tree["layers"]["mlp"]["up_proj"]["kernel"] for tree in (params, other.load(like))]
  assert not np.array_equal(*kernels)
  # The initialisation of Llama, as Hugging Face's.
  np.testing.assert_allclose(np.std(kernels[0]), 0.02, rtol=0.05)
  assert (
    len(
      {
        model.fingerprint,
        other.fingerprint,
        open_model(preset="smollm2_135m").fingerprint,
        open_model(preset="smollm2_360m").fingerprint,
      }
    )
    == 4
  )


def test_random_weights_in_sixteen_bits_and_in_parts():
  model = open_model()
  whole = model.load(abstract(model.config))
  half = model.load(abstract(model.config, param_dtype=jnp.bfloat16))
  assert_same(half, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), whole))
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 4), ("data", "weights"))
  parts = model.load(sharding.shard_like(abstract(model.config), mesh))
  kernel = parts["layers"]["mlp"]["up_proj"]["kernel"]
  assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}
  assert_same(parts, whole)


def test_random_weights_for_fewer_tokens_than_bytes(monkeypatch):
  few = llama_config.LlamaConfig(200, 8, 16, 1, 2, 2, 4)
  monkeypatch.setitem(llama_config.PRESETS, "few", few)
  with pytest.raises(UserError, match=r"config.language.preset='few': has 200 tokens, fewer than") as error:
    open_model(preset="few")
  assert "\n" not in str(error.value)
