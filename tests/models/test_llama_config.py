"""Configurations: both forms of the rotary embedding, published sizes, and what is refused."""

import dataclasses
import json

import jax
import pytest

from hamu_jax.errors import UserError
from hamu_jax.models import llama, llama_config

_SIZES = {
  "model_type": "llama",
  "vocab_size": 256,
  "hidden_size": 64,
  "intermediate_size": 112,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
}
_LLAMA3 = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
  "old, new, theta",
  [
    ({}, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}, 1e4),
    (
      {"rope_theta": 1e5, "rope_scaling": None},
      {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}},
      1e5,
    ),
    (
      {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **_LLAMA3}},
      {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **_LLAMA3}},
      5e5,
    ),
    (
      {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **_LLAMA3}},
      {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **_LLAMA3}},
      5e5,
    ),
  ],
)
def test_both_forms_of_the_rotary_embedding(old, new, theta):
  config = llama_config.from_hugging_face(_SIZES | old)
  assert config == llama_config.from_hugging_face(_SIZES | new)
  assert config.rope_theta == theta
  expected = llama_config.RopeScaling(**_LLAMA3) if theta == 5e5 else None
  assert config.rope_scaling == expected


def test_absent_fields_have_hugging_faces_defaults():
  config = llama_config.from_hugging_face(_SIZES)
  assert (config.num_key_value_heads, config.head_dim) == (4, 16)
  assert (config.rms_norm_eps, config.tie_word_embeddings) == (1e-6, False)
  assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


@pytest.mark.parametrize("given, expected", [(7, (7,)), ([7, 9], (7, 9)), (None, ())])
def test_texts_may_end_in_several_ways(given, expected):
  assert llama_config.from_hugging_face(_SIZES | {"eos_token_id": given}).eos_token_ids == expected


@pytest.mark.parametrize("name", ["llama2_7b", "llama31_8b", "llama32_1b"])
def test_what_is_written_is_read(name):
  config = llama_config.PRESETS[name]
  values = json.loads(json.dumps(llama_config.to_hugging_face(config, "bfloat16")))
  assert llama_config.from_hugging_face(values) == config


# As their model cards and safetensors indices state them.
@pytest.mark.parametrize(
  "name, parameters",
  [
    ("llama2_7b", 6_738_415_616),
    ("llama2_13b", 13_015_864_320),
    ("llama3_8b", 8_030_261_248),
    ("llama31_8b", 8_030_261_248),
    ("llama32_1b", 1_235_814_400),
    ("llama32_3b", 3_212_749_824),
    ("tinyllama_1b", 1_100_048_384),
    ("smollm2_135m", 134_515_008),
    ("smollm2_360m", 361_821_120),
    ("smollm2_1b7", 1_711_376_384),
  ],
)
def test_presets_have_the_published_sizes(name, parameters):
  model = llama.Llama(llama_config.PRESETS[name])
  assert sum(leaf.size for leaf in jax.tree.leaves(llama.abstract_params(model))) == parameters


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model_type": "mistral"}, "model_type='mistral'.*only 'llama'"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'.*only 'silu'"),
    ({"attention_bias": True}, "attention_bias=True.*only False"),
    ({"hidden_size": None}, "hidden_size=None: a whole number"),
    ({"num_key_value_heads": 3}, "num_attention_heads=4.*multiple.*num_key_value_heads=3"),
    ({"head_dim": 7}, "head_dim=7.*even"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters of type 'yarn'"),
    ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
    ({"rope_scaling": {"type": "llama3", **_LLAMA3, "factor": "8"}}, "rope_scaling.factor='8': a number"),
    ({"rope_scaling": "llama3"}, "rope_scaling='llama3': a JSON object"),
    ({"rope_theta": "1e4"}, "rope_theta='1e4': a number above 0"),
    ({"rms_norm_eps": -1}, "rms_norm_eps=-1: a number above 0"),
    ({"vocab_size": True}, "vocab_size=True: a whole number"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0: a whole number of at least 1"),
    ({"hidden_size": 2**40}, "hidden_size=1099511627776: .*below 2"),
    ({"head_dim": 8.5}, "head_dim=8.5: a whole number"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes': true or false"),
    ({"eos_token_id": [2, "3"]}, "eos_token_id='3': a whole number of at least 0"),
  ],
)
def test_what_this_llama_cannot_be(change, message, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(_SIZES | change))
  with pytest.raises(UserError, match=f"config.json: .*{message}"):
    llama_config.read_config(tmp_path)


@pytest.mark.parametrize(
  "text, message",
  [
    (None, "cannot be read.*give the folder of a Llama"),
    ("{", "cannot be read as JSON"),
    ("[]", "JSON list where an object"),
    ("[" * 100_000, "cannot be read as JSON"),
  ],
)
def test_files_that_are_no_configuration(text, message, tmp_path):
  if text is not None:
    (tmp_path / "config.json").write_text(text)
  with pytest.raises(UserError, match=message):
    llama_config.read_config(tmp_path)


def test_a_configuration_is_a_value():
  config = llama_config.PRESETS["llama32_1b"]
  assert hash(config) == hash(dataclasses.replace(config))
