"""The gradient of a LoRA adapter, by this package and by transformers and PEFT, from the same files."""

import argparse
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import llm_step
import peft
import torch
import transformers

from hamu_jax.engine import role_gradient as role_gradient_lib
from hamu_jax.models import llama, llama_config, llama_weights, lora, lora_weights

_CONFIG = {
  "vocab_size": 8192,
  "hidden_size": 512,
  "intermediate_size": 1376,
  "num_hidden_layers": 8,
  "num_attention_heads": 8,
  "max_position_embeddings": 2048,
}
_RANK, _ALPHA = 8, 16
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_pair(args: argparse.Namespace, dropout: float):
  """Two functions without arguments, ours and theirs, that return a loss and the adapter's gradient.

  Args:
    args: `rows` texts of `row_length` tokens, of which the second half is predicted; `row_microbatch` of ours
      are computed at a time.
    dropout: rate on the input of the adapter.
  """
  torch.manual_seed(0)
  with tempfile.TemporaryDirectory() as folder:
    base, adapter = pathlib.Path(folder, "base"), pathlib.Path(folder, "adapter")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_CONFIG, attn_implementation="sdpa"))
    model.save_pretrained(base)
    adapted = peft.get_peft_model(
      model, peft.LoraConfig(r=_RANK, lora_alpha=_ALPHA, lora_dropout=dropout, target_modules=_TARGETS)
    )
    for name, parameter in adapted.named_parameters():
      # With the initial B = 0 the gradient of A would be zero.
      if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(adapter)
    config = llama_config.read_config(base)
    own_model = llama.Llama(config)
    params = llama_weights.load_folder(base, llama.abstract_params(own_model), config)
    lora_config, values = lora_weights.load_adapter(adapter, params)
  sizes = argparse.Namespace(rows=args.rows, row_length=args.row_length, text_length=args.row_length)
  rows, places = llm_step.make_batch(sizes, config.vocab_size)
  return (
    _ours(args, own_model, lora_config, params, values, rows, places.retain[0]),
    _theirs(adapted, torch.tensor(rows.token[: args.rows]).long()),
  )


def _ours(args, model, config, params, values, rows, place_R):
  role = llm_step.make_role(model, config, args.row_microbatch)
  variables = {"params": lora.unstack(jax.tree.map(jnp.asarray, values)), "batch_stats": {}}
  data = jax.device_put(rows)

  @jax.jit
  def gradient(variables, base, data, place_R):
    key = jax.random.key(0)
    sums = role(
      variables, role_gradient_lib.Inputs(base, None, data, key, key, {}), place_R, {"ce": jnp.float32(1)}
    )
    return sums.values["ce"].total / sums.count, sums.gradient

  return lambda: gradient(variables, {"base": params}, data, place_R)


def _theirs(model, token_RxT):
  label_RxT = token_RxT.clone()
  label_RxT[:, : token_RxT.shape[1] // 2] = -100
  model.train()
  parameters = [each for each in model.parameters() if each.requires_grad]

  def gradient():
    loss = model(input_ids=token_RxT, labels=label_RxT).loss
    gradients = torch.autograd.grad(loss, parameters)
    return loss.detach(), [each.numpy() for each in gradients]

  return gradient
