"""Times the HAMU step of a language model with LoRA against two plain gradients, and those against a floor.

  python benchmarks/llm_step.py
  python benchmarks/llm_step.py --path=smollm2 --rows=4 --row-length=256

The floor consists of the matrix products that a gradient of the adapter requires: those of all linear layers
and the attention, forward and backward, without the gradients of the frozen weights. All figures of a call
come from one process, and all functions take turns. Rows are full of texts of equal length, and the second
half of each text is predicted.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from timing import interleave, ratios, ratios_table

from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.config.language_paper import language_config
from hamu_jax.data import packing
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import methods, placement, sub_step
from hamu_jax.engine import role_gradient as role_gradient_lib
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.train_state import create_state
from hamu_jax.language import adapter as adapter_lib
from hamu_jax.models import llama, llama_config, lora, pretrained
from hamu_jax.paired import Paired


def make_batch(args, vocabulary):
  """Returns the rows of both roles, one role after the other, and the Paired [1, R] indices of the rows."""
  rng = np.random.default_rng(0)
  count, length = 2 * args.rows, args.text_length
  texts = args.row_length // length
  predicted = length // 2
  shape = packing.Shape(count, texts * length, texts * predicted, texts)
  rows = shape.empty(count)
  text = np.arange(texts)
  rows.token[:] = rng.integers(0, vocabulary, rows.token.shape)
  rows.segment[:] = np.repeat(text + 1, length)
  rows.row[:] = np.arange(count * texts).reshape(count, texts)
  rows.owner[:] = np.repeat(rows.row, length, axis=1)
  place = text[:, None] * length + length - predicted + np.arange(predicted)
  rows.target[:] = place.ravel() - 1
  rows.label[:] = rows.token[:, place.ravel()]
  rows.slot[:] = np.repeat(text, predicted)
  rows.mask[:], rows.example_mask[:] = True, True
  rows.prediction_row[:] = np.arange(rows.mask.size).reshape(rows.mask.shape)
  places = np.arange(count, dtype=np.int32).reshape(2, 1, args.rows)
  return rows, Paired(*places)


def layer_products(config, x_BxTxD, dy_BxTxD, kernels, factors):
  """Returns the sum of the results [B, T, D] of one layer's products, and the gradients of its factors.

  Inputs and output gradients have a scale of 1, and so do the values between them, so that nothing
  overflows. There are no norms, no softmax and no gates.
  """
  heads, groups = config.num_attention_heads, config.num_key_value_heads
  gradients = {}

  def forward(name, x):
    a, b = factors[name]
    return x @ kernels[name] + (x @ a) @ b

  def backward(name, x, dy):
    a, b = factors[name]
    du = dy @ b.T
    gradients[name] = jnp.einsum("bti,btr->ir", x, du), jnp.einsum("btr,bto->ro", x @ a, dy)
    return dy @ kernels[name].T + du @ a.T

  def split(x, *heads):
    return x.reshape(*x.shape[:2], *heads, config.head_dim)

  def join(x):
    return x.reshape(*x.shape[:2], -1)

  q = split(forward("q_proj", x_BxTxD), groups, heads // groups)
  k, v = (split(forward(name, x_BxTxD), groups) for name in ("k_proj", "v_proj"))
  scores = jnp.einsum("btkgh,bskh->bkgts", q, k)
  attended = join(jnp.einsum("bkgts,bskh->btkgh", scores, v))
  inner = forward("gate_proj", x_BxTxD) + forward("up_proj", x_BxTxD)
  y = forward("o_proj", attended) + forward("down_proj", inner)

  d_inner = backward("down_proj", inner, dy_BxTxD)
  d_attended = split(backward("o_proj", attended, dy_BxTxD), groups, heads // groups)
  d_scores = jnp.einsum("btkgh,bskh->bkgts", d_attended, v)
  back = {
    "gate_proj": d_inner,
    "up_proj": d_inner,
    "q_proj": join(jnp.einsum("bkgts,bskh->btkgh", d_scores, k)),
    "k_proj": join(jnp.einsum("bkgts,btkgh->bskh", d_scores, q)),
    "v_proj": join(jnp.einsum("bkgts,btkgh->bskh", scores, d_attended)),
  }
  return y + sum(backward(name, x_BxTxD, d) for name, d in back.items()), gradients


def make_floor(args, config, params, predictions):
  """Returns a function without arguments that computes the matrix products of a gradient of one role."""
  dtype = jnp.dtype(args.dtype)
  kernels = {
    name: module["kernel"] for part in ("self_attn", "mlp") for name, module in params["layers"][part].items()
  }
  embedding_VxD = params["embed_tokens"]["embedding"]
  keys = iter(jax.random.split(jax.random.key(1), 2 * len(kernels) + 3))

  def draw(*shape):
    return jax.random.normal(next(keys), shape, dtype)

  factors = {
    name: (draw(*kernel.shape[:2], args.rank), draw(len(kernel), args.rank, kernel.shape[2]))
    for name, kernel in kernels.items()
  }
  shape = args.rows // args.microbatch, args.microbatch, args.row_length, config.hidden_size
  rows = draw(*shape), draw(*shape), draw(*shape[:2], predictions, config.hidden_size)

  @jax.jit
  def floor(rows, kernels, factors, embedding_VxD):
    def piece(x_BxTxD, dy_BxTxD, states_BxPxD):

      def body(total, weights):
        y_BxTxD, gradients = layer_products(config, x_BxTxD, dy_BxTxD, *weights)
        return total + y_BxTxD, gradients

      out = lax.scan(body, jnp.zeros_like(x_BxTxD), (kernels, factors))
      logits_BxPxV = jnp.einsum("bpd,vd->bpv", states_BxPxD, embedding_VxD)
      return out, jnp.einsum("bpv,vd->bpd", logits_BxPxV, embedding_VxD)

    def add(total, role):
      return jax.tree.map(jnp.add, total, piece(*role)), None

    first = jax.tree.map(lambda x: x[0], rows)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(piece, *first))
    return lax.scan(add, zeros, rows)[0]

  return lambda: floor(rows, kernels, factors, embedding_VxD)


def make_role(model, config, microbatch):
  """Returns the function of `role_gradient.role_gradient` for the cross-entropy of an adapted model."""
  return role_gradient_lib.role_gradient(
    adapter_lib.make_forward(model, config),
    adapter_lib.fetch,
    ("ce",),
    train=True,
    microbatch=microbatch,
  )


def make_plain(args, model, config, data, variables, frozen, places, dropout):
  """Returns a function without arguments that computes plain gradients of some batches, as a step does."""
  config = lora.LoraConfig(config.rank, config.alpha, dropout, config.targets)
  role = make_role(model, config, args.microbatch)

  @jax.jit
  def plain(variables, base, data, places):
    key = jax.random.key(0)
    inputs = role_gradient_lib.Inputs(base, None, data, key, key, {})
    one = {"ce": jnp.float32(1)}
    return [role(variables, inputs, rows_R, one).gradient for rows_R in places]

  return lambda: plain(variables, frozen.base, data, places)


def make_step(args, model, config, data, variables, frozen, places, pairing):
  """Returns a function without arguments that runs one step, as the loop does."""
  options = language_config().method
  # With "project" the step never stops, whatever the gradients are.
  options.name, options.on_infeasible = args.method, "project"
  program = step_lib.make_step(
    methods.METHODS[args.method],
    options,
    forward=adapter_lib.make_forward(model, config),
    fetch=adapter_lib.fetch,
    pairing=pairing,
    train=True,
    microbatch=args.microbatch,
    schedule=optax.constant_schedule(1.0),
  )
  chunk = chunk_lib.compile_target(chunk_lib.make_chunk(program.step), None, ("retain", "forget"))
  hyperparameters = hyperparameters_of(options, methods.METHODS[args.method])
  state = jax.device_put(create_state(variables, program.optimizers(hyperparameters), 0))
  batches = placement.place_batches(places, np.zeros(1, np.int32), None)
  return lambda: chunk(state, frozen, data, batches, jnp.int32(1), hyperparameters)


def time_steps(args):
  """Prints and returns the seconds of the floor, the gradients and the steps."""
  found = pretrained.open_model(args.path, preset=args.model, seed=0)
  dtype = jnp.dtype(args.dtype)
  model = llama.Llama(
    found.config,
    dtype=dtype,
    param_dtype=dtype,
    rematerialization=args.rematerialization,
    attention=args.attention,
  )
  config = lora.LoraConfig(rank=args.rank, dropout=args.dropout)
  params = found.load(llama.abstract_params(model))
  # Both factors are random, because with the initial B = 0 the gradient of A would be zero.
  adapter = jax.tree.map(
    lambda leaf: 0.01 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
    lora.init(jax.random.key(0), config, params),
  )
  variables = {"params": lora.unstack(adapter), "batch_stats": {}}
  rows, places = make_batch(args, found.config.vocab_size)
  data, frozen = jax.device_put(rows), sub_step.Frozen(base={"base": params})
  common = (args, model, config, data, variables, frozen)
  one, both = (places.retain[0],), tuple(role[0] for role in places)
  functions = {
    "floor": make_floor(args, found.config, params, rows.mask.shape[1]),
    "plain without dropout": make_plain(*common, one, 0.0),
    "plain": make_plain(*common, one, args.dropout),
    "two plain": make_plain(*common, both, args.dropout),
  }
  for pairing in args.pairings:
    functions[f"{args.method} {pairing}"] = make_step(*common, places, pairing)
  seconds, first = interleave(functions, args.rounds)

  tensors = len(jax.tree.leaves(variables["params"]))
  tokens = args.rows * args.row_length
  print(
    f"{args.path or args.model}, {args.dtype}, rank {args.rank}, {tensors} tensors; a role has "
    f"{args.rows} rows of {args.row_length} tokens, {rows.mask.shape[1]} predicted, "
    f"{args.microbatch} at a time; {args.rounds} rounds"
  )
  results = {}
  for base, names in (("floor", list(functions)[:3]), ("two plain", list(functions)[3:])):
    part = ratios({name: seconds[name] for name in names}, base)
    roles = 1 if base == "floor" else 2
    speed = {name: f"{roles * tokens / result['seconds']['median']:.0f}" for name, result in part.items()}
    print(
      ratios_table(part, base, tokens_per_s=speed, first_call_s={name: f"{first[name]:.1f}" for name in part})
    )
    results |= {name: result | {"first_call": first[name]} for name, result in part.items()}
  return results


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--model",
    default="smollm2_135m",
    choices=llama_config.PRESETS,
    metavar="PRESET",
    help="sizes, with random weights",
  )
  parser.add_argument("--path", default="", help="a pretrained model instead, see config.language.path")
  parser.add_argument("--method", default="hamu-q", help="a method that reads both roles")
  parser.add_argument("--pairings", type=lambda text: text.split(","), default=["sequential", "vmap"])
  parser.add_argument("--rows", type=int, default=2, help="packed rows of a role")
  parser.add_argument("--row-length", type=int, default=128, help="tokens of a row")
  parser.add_argument("--text-length", type=int, default=64, help="tokens of a text")
  parser.add_argument("--microbatch", type=int, default=1, help="rows computed at a time")
  parser.add_argument("--rank", type=int, default=8)
  parser.add_argument("--dropout", type=float, default=0.05)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--rematerialization", default="none", choices=llama.REMATERIALIZATION)
  parser.add_argument("--attention", default="xla", choices=("xla", "cudnn"))
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  if args.rows % args.microbatch or args.row_length % args.text_length:
    parser.error("--microbatch must divide --rows, and --text-length --row-length")
  results = time_steps(args)
  if args.json:
    with open(args.json, "w") as file:
      json.dump({"arguments": vars(args), "results": results}, file, indent=2)


if __name__ == "__main__":
  main()
