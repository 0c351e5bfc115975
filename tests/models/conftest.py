"""The tiny Llamas of `golden/llama`: weights, adapters and what transformers and PEFT compute."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.models import llama, llama_config, llama_weights, lora, lora_weights

SHAPES = ("gqa_tied", "llama2_like", "llama3_scaled")
# Every fourth token's logits are stored.
STORED = 4


class Golden(NamedTuple):
  """A model, its adapter, and the expected numbers."""

  folder: Any
  config: llama_config.LlamaConfig
  model: llama.Llama
  params: Any
  lora: lora.LoraConfig
  adapter: Any
  expected: dict

  @property
  def tokens(self):
    return jnp.asarray(self.expected["input_ids"])

  @property
  def mask(self):
    return jnp.asarray(self.expected["attention_mask"])

  @property
  def variables(self):
    return {"params": self.params, "lora": self.adapter}


@pytest.fixture(scope="session")
def read_llama():
  """-> function: the golden model of a shape."""

  def read(shape, root):
    folder = root / "llama" / shape
    config = llama_config.read_config(folder)
    model = llama.Llama(config)
    like = llama.abstract_params(model)
    params = llama_weights.load_folder(folder, like, config)
    spec, adapter = lora_weights.load_adapter(folder / "adapter", like)
    with np.load(folder / "expected.npz") as arrays:
      expected = dict(arrays)
    return Golden(folder, config, model, params, spec, adapter, expected)

  return read


@pytest.fixture(params=SHAPES)
def any_llama(request, read_llama, golden):
  """Each of the three."""
  return read_llama(request.param, golden)


@pytest.fixture
def tiny_llama(read_llama, golden):
  """Grouped-query attention with an output matrix of its own."""
  return read_llama("llama2_like", golden)


@pytest.fixture
def answer_losses():
  """-> function: (logits, labels) -> mean cross-entropy of each row's labels, and of all."""

  def losses(logits_BxTxV, label_BxT):
    log_probs = jax.nn.log_softmax(logits_BxTxV[:, :-1])
    label = label_BxT[:, 1:]
    counted = label >= 0
    picked = jnp.take_along_axis(log_probs, label.clip(0)[:, :, None], axis=2)[:, :, 0]
    loss = jnp.where(counted, -picked, 0)
    return loss.sum(1) / counted.sum(1), loss.sum() / counted.sum()

  return losses


@pytest.fixture
def check_logits():
  """-> function: holds logits to stored ones, at tokens that are not padding."""

  def check(logits, stored, mask):
    valid = np.asarray(mask) == 1
    np.testing.assert_allclose(
        np.asarray(logits)[:, :, ::STORED][valid], stored[valid], rtol=0, atol=2e-4)

  return check
