"""What tests of models share: the tiny Llamas of `golden/llama`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SHAPES = ("gqa_tied", "llama2_like", "llama3_scaled")
# Every fourth token's logits are stored.
STORED = 4


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
    np.testing.assert_allclose(np.asarray(logits)[:, :, ::STORED][valid], stored[valid], rtol=0, atol=2e-4)

  return check
