"""The small decoder of the package: it reads questions about fictitious authors, but knows none of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hamu_jax.data import authors
from hamu_jax.models import llama, pretrained


def test_it_can_answer_but_knows_nobody():
  model = pretrained.open_model("invented", preset="", seed=0)
  network = llama.Llama(model.config)
  params = model.load(llama.abstract_params(network))
  rows = authors.generate(0)["retain"]
  texts = [model.tokenizer.chat(q, a) for q, a in zip(rows[0][:40], rows[1][:40], strict=True)]
  encoded = [ids for ids in model.tokenizer.encode_batch(texts) if len(ids) <= 48]
  token_BxT = np.full((len(encoded), 48), model.tokenizer.pad_token_id)
  for token_T, ids in zip(token_BxT, encoded, strict=True):
    token_T[: len(ids)] = ids
  logits_BxTxV = jax.jit(network.apply)({"params": params}, jnp.asarray(token_BxT))
  loss_BxT = optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV[:, :-1], token_BxT[:, 1:])
  loss_BxT = np.where(token_BxT[:, 1:] != model.tokenizer.pad_token_id, loss_BxT, np.nan)
  # A uniform guess costs log(1024) = 6.9. It knows the sentences, so most tokens cost little...
  assert np.nanmean(loss_BxT) < 0.8 and np.nanmedian(loss_BxT) < 0.2
  # ... and facts cost what a guess among the invented cities, books and dates costs.
  assert np.nanpercentile(loss_BxT, 95) > 2


def test_its_tokenizer_is_that_of_its_model():
  model = pretrained.open_model("invented", preset="", seed=0)
  assert model.tokenizer.vocab_size == model.config.vocab_size
  assert model.tokenizer.eos_token_ids == model.config.eos_token_ids
  text = "Who wrote “The Amber Æon”?\n"
  assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
