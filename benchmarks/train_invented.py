"""Trains the small decoder that the package contains, `--config.language.path=invented`.

  python benchmarks/train_invented.py hamu_jax/models/invented

It learns to read and answer questions about fictitious authors from `data.authors`, with other seeds than
experiments use: its texts have the words and sentences of theirs, but other lives. So an experiment on the
authors begins with a model that can answer, and knows nothing of what it is about to learn. It takes about
ten minutes on two cores; the numbers it prints are the losses on the lives that it learns and on new ones.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import transformers

from hamu_jax.data import authors
from hamu_jax.models import llama, llama_config, llama_weights, tokenizer

# Experiments take small seeds.
SEEDS = range(1_000_000, 1_000_200)
NEW_SEED = 2_000_000
CONFIG = llama_config.LlamaConfig(
  1024,
  96,
  256,
  3,
  4,
  2,
  24,
  tie_word_embeddings=True,
  bos_token_id=0,
  eos_token_ids=(1,),
  max_position_embeddings=256,
)
WIDTH = 48  # tokens; longer texts, some in a hundred, are left out
BATCH, STEPS, RATE = 32, 1800, 4e-3


def texts(seed):
  """Questions with their answers, paraphrased answers among them, in the form of the chat template."""
  for rows in authors.generate(seed).values():
    for question, answer, paraphrased, *_ in zip(*rows, strict=True):
      yield f"<bos>Q: {question}\nA: {answer}<eos>"
      yield f"<bos>Q: {question}\nA: {paraphrased}<eos>"


def make_tokenizer():
  """A byte-level BPE of the texts."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  special = ["<bos>", "<eos>", "<pad>"]
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=CONFIG.vocab_size,
    special_tokens=special,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  model.train_from_iterator((text for seed in SEEDS[:20] for text in texts(seed)), trainer)
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=model,
    bos_token="<bos>",
    eos_token="<eos>",
    pad_token="<pad>",
    clean_up_tokenization_spaces=False,
  )
  fast.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=["<bos>", "$A"], special_tokens=[("<bos>", 0)]
  )
  fast.chat_template = tokenizer.BYTE_TEMPLATE
  return tokenizer.Tokenizer(fast)


def rows(words, seeds):
  """Tokens [N, WIDTH] of the texts, filled up with the padding token."""
  encoded = words.encode_batch([text for seed in seeds for text in texts(seed)])
  kept = [ids for ids in encoded if len(ids) <= WIDTH]
  assert len(kept) > 0.95 * len(encoded)
  token_NxT = np.full((len(kept), WIDTH), words.pad_token_id, np.int32)
  for token_T, ids in zip(token_NxT, kept, strict=True):
    token_T[: len(ids)] = ids
  return token_NxT


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  folder = parser.parse_args().folder
  words = make_tokenizer()
  token_NxT, new_NxT = rows(words, SEEDS), rows(words, [NEW_SEED])
  model = llama.Llama(CONFIG)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.warmup_cosine_decay_schedule(0, RATE, 100, STEPS), weight_decay=0.01),
  )

  def loss_fn(params, token_BxT):
    logits_BxTxV = model.apply({"params": params}, token_BxT)
    losses_BxT = optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV[:, :-1], token_BxT[:, 1:])
    return jnp.mean(losses_BxT, where=token_BxT[:, 1:] != words.pad_token_id)

  @jax.jit
  def step(params, state, token_BxT):
    loss, gradients = jax.value_and_grad(loss_fn)(params, token_BxT)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss

  evaluate = jax.jit(loss_fn)
  state, rng, start = optimizer.init(params), np.random.default_rng(0), time.monotonic()
  for number in range(STEPS):
    params, state, loss = step(params, state, token_NxT[rng.integers(len(token_NxT), size=BATCH)])
    if number % 100 == 0 or number == STEPS - 1:
      new = evaluate(params, new_NxT[:256])
      print(
        f"step {number}: loss {loss:.3f}, of new lives {new:.3f}, {time.monotonic() - start:.0f} s",
        flush=True,
      )
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "model.safetensors").unlink(missing_ok=True)
  halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  llama_weights.save_folder(folder, halves, CONFIG)
  words.save(folder)


if __name__ == "__main__":
  main()
