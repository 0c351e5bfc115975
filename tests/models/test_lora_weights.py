"""PEFT's format: what PEFT wrote is read and written without loss; what does not fit is named."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

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
    (lambda t: t.pop(_Q), f"tensor '{_Q}' is missing; adapt a projection in all layers"),
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
    ({"use_rslora": True}, "use_rslora=True"),
    ({"bias": "all"}, "bias='all' is not supported, only 'none'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
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
    ("adapter_config.json", "{", "adapter_config.json: not JSON"),
    ("adapter_config.json", '{"peft_type": "LORA"}', "lacks 'r'"),
    (_FILE, None, f"{_FILE}: no such file"),
    (_FILE, "{", f"{_FILE}: not a safetensors file"),
  ],
)
def test_damaged_folders(tiny_llama, copy, name, text, message):
  (copy / name).unlink()
  if text is not None:
    (copy / name).write_text(text)
  with pytest.raises(UserError, match=message):
    lora_weights.load_adapter(copy, tiny_llama.params)
