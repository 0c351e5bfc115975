"""LoRA: low-rank adapters beside frozen linear layers.

  `y = x W + (alpha / r) drop(x) A B`

with W [I, O] frozen, A [I, r] and B [r, O] trained, and B = 0 at first. Source: Hu et al., LoRA:
Low-Rank Adaptation of Large Language Models (arXiv 2106.09685); initial values as PEFT's.

An adapter is a tree of its own, the collection "lora" of the model's variables: whoever
differentiates it leaves the base alone, and without it the same base weights are the original
model. The model knows nothing of it: calls of its `nn.Dense` layers are intercepted where the
adapter has factors for their path.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from hamu_jax.errors import UserError

Tree = Any

COLLECTION = "lora"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """What an adapter is, beside its values.

  Attributes:
    rank: r, columns of A.
    alpha: the product of the factors is scaled by alpha / r.
    dropout: share of an adapted layer's inputs that its adapter does not see in training.
    targets: linear layers, as in PEFT: by name ("q_proj") or the end of a path
      ("self_attn.q_proj").
  """

  rank: int = 8
  alpha: float = 16.0
  dropout: float = 0.0
  targets: tuple[str, ...] = PROJECTIONS

  def __post_init__(self):
    if self.rank < 1:
      raise UserError(f"lora rank {self.rank}: choose 1 or more")
    if not 0 <= self.dropout < 1:
      raise UserError(f"lora dropout {self.dropout}: choose a share in [0, 1)")

  @property
  def scaling(self) -> float:
    """alpha / r."""
    return self.alpha / self.rank


class Tokens(NamedTuple):
  """Which token of which example is where in a batch, for dropout that depends on nothing else.

  Attributes:
    example_BxT: numbers of the examples.
    position_BxT: positions in their examples.
  """

  example_BxT: jax.Array
  position_BxT: jax.Array


def init(key: jax.Array, config: LoraConfig, params: Tree) -> Tree:
  """An adapter that changes nothing yet: A is uniform in +-1 / sqrt(I), B is 0.

  Args:
    key: for A.
    config: what to adapt.
    params: of the model, or their shapes; layers may be stacked, [L, I, O].

  Returns:
    {path: {"lora_A": [..., I, r], "lora_B": [..., r, O]}}, nested, float32.

  Raises:
    UserError: a target is no linear layer of the model.
  """
  kernels = {
    path[:-1]: leaf.shape for path, leaf in traverse_util.flatten_dict(params).items() if path[-1] == "kernel"
  }
  for target in config.targets:
    if not any(_is_target(path, (target,)) for path in kernels):
      names = sorted({path[-1] for path in kernels})
      raise UserError(
        f"lora target {target!r} is no linear layer of this model; choose from {', '.join(names)}"
      )
  chosen = sorted(path for path in kernels if _is_target(path, config.targets))
  adapter = {}
  for path, path_key in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
    *stack, inputs, outputs = kernels[path]
    bound = 1 / math.sqrt(inputs)
    adapter[*path, "lora_A"] = jax.random.uniform(
      path_key, (*stack, inputs, config.rank), jnp.float32, -bound, bound
    )
    adapter[*path, "lora_B"] = jnp.zeros((*stack, config.rank, outputs), jnp.float32)
  return traverse_util.unflatten_dict(adapter)


def unstack(adapter: Tree) -> Tree:
  """The adapter with the factors of each layer as tensors of their own, as PEFT has them.

  What treats tensors one by one, such as HAMU, or names them, takes this form; `stack` undoes it.

  Args:
    adapter: as of `init`, or its gradient.

  Returns:
    {"layers": {"00": {path: {"lora_A": [I, r], "lora_B": [r, O]}}, ...}} and what is no layer's; the
    numbers have as many digits as the last layer's.
  """
  if "layers" not in adapter:
    return adapter
  count = jax.tree.leaves(adapter["layers"])[0].shape[0]
  digits = len(str(count - 1))  # Of one width, names sort as the layers do.
  layers = {f"{i:0{digits}}": jax.tree.map(lambda leaf: leaf[i], adapter["layers"]) for i in range(count)}
  return adapter | {"layers": layers}


def stack(adapter: Tree) -> Tree:
  """Undoes `unstack`."""
  if "layers" not in adapter:
    return adapter
  layers = [layer for _, layer in sorted(adapter["layers"].items())]
  return adapter | {"layers": jax.tree.map(lambda *parts: jnp.stack(parts), *layers)}


def with_lora(
  apply: Callable[..., Any], config: LoraConfig, tokens: Tokens | None = None
) -> Callable[..., Any]:
  """The same as `apply`, with the adapter that is among the variables.

  Args:
    apply: `apply` of a linen model.
    config: of the adapter; its targets are those that the adapter has factors for.
    tokens: switches dropout on, which takes the key `rngs={"dropout": key}`; None is evaluation.

  Returns:
    ({"params": base, "lora": adapter}, *args, **kwargs) -> what `apply` returns; without "lora", of
    the base model.
  """

  def intercept(next_call, args, kwargs, context):
    y = next_call(*args, **kwargs)
    module = context.module
    adapted = isinstance(module, nn.Dense) and context.method_name == "__call__"
    if not (adapted and module.has_variable(COLLECTION, "lora_A")):
      return y
    (x,) = args
    if tokens is not None and config.dropout:
      x = _drop(x, module.make_rng("dropout"), tokens, config.dropout)
    x, a, b = nn.dtypes.promote_dtype(
      x,
      module.get_variable(COLLECTION, "lora_A"),
      module.get_variable(COLLECTION, "lora_B"),
      dtype=module.dtype,
    )
    return y + (config.scaling * ((x @ a) @ b)).astype(y.dtype)

  def adapted_apply(variables, *args, **kwargs):
    with nn.intercept_methods(intercept):
      return apply(variables, *args, **kwargs)

  return adapted_apply


def merge(params: Tree, adapter: Tree, config: LoraConfig) -> Tree:
  """The parameters of a plain model that computes what the adapted one does: `W + (alpha / r) A B`.

  Args:
    params: of the base model.
    adapter: as of `init`.
    config: its scaling.

  Returns:
    The same structure, shapes and dtypes as `params`; the sum is in float32.
  """
  flat, factors = traverse_util.flatten_dict(params), traverse_util.flatten_dict(adapter)
  for path in {path[:-1] for path in factors}:
    a, b = factors[*path, "lora_A"], factors[*path, "lora_B"]
    flat[*path, "kernel"] = _add_product(flat[*path, "kernel"], a, b, config.scaling)
  return traverse_util.unflatten_dict(flat)


@functools.partial(jax.jit, static_argnums=3)
def _add_product(kernel, a, b, scaling):
  change = scaling * jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
  return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)


def _is_target(path, targets):
  dotted = "." + ".".join(path)
  return any(dotted.endswith("." + target) for target in targets)


def _drop(x_BxTxI, key, tokens, rate):
  """Inverted dropout, each token's own."""

  def keep(example, position):
    token_key = jax.random.fold_in(jax.random.fold_in(key, example), position)
    return jax.random.bernoulli(token_key, 1 - rate, x_BxTxI.shape[-1:])

  keep_BxTxI = jax.vmap(jax.vmap(keep))(tokens.example_BxT, tokens.position_BxT)
  return jnp.where(keep_BxTxI, x_BxTxI / (1 - rate), 0)
