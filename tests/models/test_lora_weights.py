"""PEFT's format: what PEFT wrote is read and written without loss; what does not fit is named."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from hamu_jax.errors import UserError
from hamu_jax.models import llama_weights, lora, lora_weights

_FILE = "adapter_model.safetensors"
_Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def _tensors(folder):
  return safetensors.numpy.load_file(folder / _FILE)


def test_what_peft_wrote_is_written_again(any_llama, tmp_path):
  lora_weights.save_adapter(tmp_path, any_llama.adapter, any_llama.lora)
  theirs, ours = _tensors(any_llama.folder / "adapter"), _tensors(tmp_path)
  assert set(theirs) == set(ours)
  for name, value in theirs.items():
    assert value.dtype == ours[name].dtype
    np.testing.assert_array_equal(value, ours[name])
  read = [
    json.loads((folder / "adapter_config.json").read_text())
    for folder in (any_llama.folder / "adapter", tmp_path)
  ]
  for values in read:
    values["target_modules"] = sorted(values["target_modules"])
  assert {name: read[0][name] for name in read[1]} == read[1]
  assert read[1]["r"] == 4 and read[1]["lora_alpha"] == 8


def test_configuration(any_llama):
  assert any_llama.lora == lora.LoraConfig(4, 8, 0.0, tuple(sorted(lora.PROJECTIONS)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip_of_some_targets(tiny_llama, tmp_path, dtype):
  config = lora.LoraConfig(3, 12.5, 0.05, ("lm_head", "v_proj"))
  adapter = lora.init(jax.random.key(0), config, tiny_llama.params)
  adapter = jax.tree.map(lambda leaf: (leaf + 0.1).astype(dtype), adapter)
  lora_weights.save_adapter(tmp_path, adapter, config, base_model="some/model")
  assert "base_model.model.lm_head.lora_A.weight" in _tensors(tmp_path)
  found, values = lora_weights.load_adapter(tmp_path, tiny_llama.params)
  assert found == config
  assert jax.tree.structure(values) == jax.tree.structure(adapter)
  for left, right in zip(*map(jax.tree.leaves, (values, adapter)), strict=True):
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(left, right)
  text = (tmp_path / "adapter_config.json").read_text()
  assert json.loads(text)["base_model_name_or_path"] == "some/model"


def test_others_may_read_what_the_umask_lets_them(tmp_path):
  before = os.umask(0o027)
  try:
    llama_weights.write_safetensors(tmp_path / "file", {"a": np.ones(2)})
  finally:
    os.umask(before)
  assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_an_adapter_is_replaced(tiny_llama, tmp_path):
  lora_weights.save_adapter(tmp_path, tiny_llama.adapter, tiny_llama.lora)
  doubled = jax.tree.map(lambda leaf: 2 * leaf, tiny_llama.adapter)
  lora_weights.save_adapter(tmp_path, doubled, tiny_llama.lora)
  _, found = lora_weights.load_adapter(tmp_path, tiny_llama.params)
  jax.tree.map(np.testing.assert_array_equal, found, doubled)


@pytest.fixture
def copy(tiny_llama, tmp_path):
  """A golden adapter that may be damaged."""
  folder = tmp_path / "copy"
  shutil.copytree(tiny_llama.folder / "adapter", folder)
  return folder


def _change_tensors(folder, change):
  tensors = _tensors(folder)
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / _FILE)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda t: t.pop(_Q), f"tensor '{_Q}' is missing, though target_modules names its layer"),
    (lambda t: t.update({_Q: t[_Q][:, :8]}), rf"tensor '{_Q}' has shape \(4, 8\).*needs \(4, 64\)"),
    (lambda t: t.update({_Q.replace("s.1", "s.2"): t[_Q]}), "layers.2.*fits nothing.*another one"),
    (lambda t: [t.pop(name) for name in list(t) if "lora_B" in name], "lora_B.weight' is missing"),
  ],
)
def test_an_adapter_of_another_model(tiny_llama, copy, change, message):
  _change_tensors(copy, change)
  with pytest.raises(UserError, match=message):
    lora_weights.load_adapter(copy, tiny_llama.params)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"peft_type": "IA3"}, "not a LoRA adapter"),
    ({"use_dora": True}, "use_dora=True is not supported, only False"),
    ({"bias": "every"}, "bias='every': choose from none, all, lora_only"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' has changed the base.*path_initial"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' has changed the base"),
    ({"velora_config": {"scale": 2}}, "velora_config=.* is not supported"),
    ({"fields_of_2027": "fourier"}, "the field fields_of_2027='fourier' is unknown"),
    ({"r": "4"}, "r='4': a whole number"),
    ({"r": 0}, "r=0: a whole number"),
    ({"lora_alpha": float("inf")}, "lora_alpha=inf: a finite number"),
    ({"target_modules": 3}, "target_modules=3: names or a regular expression"),
    ({"target_modules": "(q"}, "cannot be read as a configuration of PEFT"),
    ({"target_modules": ["fc1"]}, "fits nothing"),
    ({"base_model_name_or_path": {"a": 1}}, "base_model_name_or_path=.* is not a name"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    ({"rank_pattern": {"q_proj": 2}}, r"q_proj.lora_A.weight' has shape \(4, 64\).*needs \(2, 64\)"),
    ({"layers_to_transform": [0]}, "fits nothing"),
    ({"r": 8}, "has shape .* needs"),
  ],
)
def test_adapters_that_are_not_supported(tiny_llama, copy, change, message):
  file = copy / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(UserError, match=message):
    lora_weights.load_adapter(copy, tiny_llama.params)


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("adapter_config.json", None, "adapter_config.json: cannot be read"),
    ("adapter_config.json", "{", "adapter_config.json: cannot be read as JSON"),
    ("adapter_config.json", "[" * 100_000, "adapter_config.json: cannot be read as JSON"),
    ("adapter_config.json", '{"peft_type": "LORA"}', "lacks 'r'"),
    (_FILE, None, f"{_FILE}: no such file"),
    (_FILE, "{", f"{_FILE}: cannot be read as a safetensors file"),
  ],
)
def test_damaged_folders(tiny_llama, copy, name, text, message):
  (copy / name).unlink()
  if text is not None:
    (copy / name).write_text(text)
  with pytest.raises(UserError, match=message):
    lora_weights.load_adapter(copy, tiny_llama.params)


def test_off_in_other_words(tiny_llama, copy):
  """Trainers other than PEFT's write an empty list or object where PEFT writes null."""
  file = copy / "adapter_config.json"
  expected = lora_weights.load_adapter(copy, tiny_llama.params)
  names = ("modules_to_save", "layers_to_transform", "exclude_modules", "alora_invocation_tokens", "of_2027")
  file.write_text(json.dumps(json.loads(file.read_text()) | dict.fromkeys(names, [])))
  found = lora_weights.load_adapter(copy, tiny_llama.params)
  assert found[0] == expected[0]
  jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


_LAYERS = [f"model.layers.{i}." for i in range(2)]
_ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
_MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
  "changes, modules",
  [
    # {module: (rank, scale)}, read off PEFT's documentation.
    ({"target_modules": ["q_proj"], "use_rslora": True}, {f"{i}self_attn.q_proj": (4, 4) for i in _LAYERS}),
    (
      {"target_modules": ["q_proj", "mlp.up_proj"], "rank_pattern": {"q_proj": 2}},
      {f"{i}self_attn.q_proj": (2, 4) for i in _LAYERS} | {f"{i}mlp.up_proj": (4, 2) for i in _LAYERS},
    ),
    (
      {"target_modules": ["v_proj"], "alpha_pattern": {"layers.1.self_attn.v_proj": 2}},
      {f"{_LAYERS[0]}self_attn.v_proj": (4, 2), f"{_LAYERS[1]}self_attn.v_proj": (4, 0.5)},
    ),
    ({"target_modules": ["k_proj"], "layers_to_transform": [1]}, {f"{_LAYERS[1]}self_attn.k_proj": (4, 2)}),
    (
      {"target_modules": r".*\.1\..*_proj", "exclude_modules": ["up_proj"]},
      {_LAYERS[1] + name: (4, 2) for name in _ATTENTION + _MLP if "up" not in name},
    ),
    ({"target_modules": "all-linear"}, {i + name: (4, 2) for i in _LAYERS for name in _ATTENTION + _MLP}),
    (
      {
        "target_modules": ["o_proj"],
        "rank_pattern": {"model.layers.0.self_attn.o_proj": 3},
        "use_rslora": True,
      },
      {f"{_LAYERS[0]}self_attn.o_proj": (3, 8 / 3**0.5), f"{_LAYERS[1]}self_attn.o_proj": (4, 4)},
    ),
  ],
)
def test_ranks_and_scales_of_each_layer(tiny_llama, copy, changes, modules):
  """Merged kernels are W + scale (B A)^T, by the factors and scale of each layer; no other changes."""
  params, rng = tiny_llama.params, np.random.default_rng(0)
  file = copy / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 4, "lora_alpha": 8} | changes))
  expected = {name: np.array(value) for name, value in traverse_util.flatten_dict(params, sep=".").items()}
  tensors = {}
  for module, (rank, scale) in modules.items():
    layer, owner = module.removeprefix("model.layers.").split(".", 1)
    kernel = expected[f"layers.{owner}.kernel"][int(layer)]
    a = rng.standard_normal((rank, kernel.shape[0])).astype(np.float32)
    b = rng.standard_normal((kernel.shape[1], rank)).astype(np.float32)
    kernel += scale * (b @ a).T
    for factor, value in (("A", a), ("B", b)):
      tensors[f"base_model.model.{module}.lora_{factor}.weight"] = value
  safetensors.numpy.save_file(tensors, copy / _FILE)
  config, adapter = lora_weights.load_adapter(copy, params)
  merged = traverse_util.flatten_dict(lora.merge(params, adapter, config), sep=".")
  for name, value in expected.items():
    np.testing.assert_allclose(merged[name], value, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda name: name.replace("base_model.model.", ""), "lacks the prefix 'base_model.model.'"),
    (lambda name: name.replace(".weight", ".default.weight"), r"names the adapter itself \('.default.'\)"),
    (lambda name: name.replace("q_proj.lora_A", "q_proj.base_layer"), "belongs to .*q_proj.*whole weights"),
    (lambda name: name.replace("q_proj.lora_A.weight", "q_proj.bias"), "belongs to .*biases"),
  ],
)
def test_names_that_peft_does_not_write(tiny_llama, copy, change, message):
  renamed = {change(name): value for name, value in _tensors(copy).items()}
  safetensors.numpy.save_file(renamed, copy / _FILE)
  with pytest.raises(UserError, match=message) as refusal:
    lora_weights.load_adapter(copy, tiny_llama.params)
  assert "for another" not in str(refusal.value)


def test_a_pickled_adapter_is_named(tiny_llama, copy):
  (copy / _FILE).rename(copy / "adapter_model.bin")
  with pytest.raises(UserError, match="holds adapter_model.bin, which may run code.*safe_serialization=True"):
    lora_weights.load_adapter(copy, tiny_llama.params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_product_of_16_bit_factors_is_in_float32(tiny_llama, dtype):
  rng = np.random.default_rng(0)
  adapter = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), dtype), tiny_llama.adapter)
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), adapter)
  merged = [lora.merge(tiny_llama.params, each, tiny_llama.lora) for each in (adapter, wide)]
  jax.tree.map(np.testing.assert_array_equal, *merged)
