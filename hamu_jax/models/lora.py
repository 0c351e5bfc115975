"""LoRA: low-rank adapters of frozen linear layers.

  `y = x W + (alpha / r) drop(x) A B`

W [I, O] is frozen, A [I, r] and B [r, O] are trained, and B is initially 0. Source: Hu et al., LoRA:
Low-Rank Adaptation of Large Language Models (arXiv 2106.09685); initial values as in PEFT.

An adapter is a tree of its own, the collection "lora" of the model's variables. So it can be differentiated
without the base, and without it the same base weights are the original model. The model is not changed for
it: calls of its `nn.Dense` layers are intercepted if the adapter has factors for their path.
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
  """Configuration of an adapter.

  Attributes:
    rank: r, number of columns of A.
    alpha: numerator of the factor alpha / r by which A B is scaled.
    dropout: share of the inputs of an adapted layer that its adapter drops in training.
    targets: linear layers to adapt, as in PEFT: by name ("q_proj") or by the end of a path
      ("self_attn.q_proj").
  """

  rank: int = 8
  alpha: float = 16.0
  dropout: float = 0.0
  targets: tuple[str, ...] = PROJECTIONS

  def __post_init__(self):
    if self.rank < 1:
      raise UserError(f"lora rank={self.rank}: choose 1 or more")
    if not 0 <= self.dropout < 1:
      raise UserError(f"lora dropout={self.dropout}: choose a share in [0, 1)")

  @property
  def scaling(self) -> float:
    """alpha / r."""
    return self.alpha / self.rank


class Tokens(NamedTuple):
  """Identity of each token in a batch, so that its dropout depends on nothing else.

  Attributes:
    example_BxT: index of each token's example.
    position_BxT: position of each token in its example.
  """

  example_BxT: jax.Array
  position_BxT: jax.Array


def init(key: jax.Array, config: LoraConfig, params: Tree) -> Tree:
  """Initializes an adapter: A is uniform in +-1 / sqrt(I) and B is 0, so that the model is unchanged.

  Args:
    key: random key of A.
    config: configuration of the adapter.
    params: parameters of the model, or their shapes; layers may be stacked, [L, I, O].

  Returns:
    {path: {"lora_A": [..., I, r], "lora_B": [..., r, O]}}, nested, float32.

  Raises:
    UserError: if a target is not a linear layer of the model.
  """
  kernels = {
    path[:-1]: leaf.shape for path, leaf in traverse_util.flatten_dict(params).items() if path[-1] == "kernel"
  }
  for target in config.targets:
    if not any(_is_target(path, (target,)) for path in kernels):
      names = sorted({path[-1] for path in kernels})
      raise UserError(
        f"lora target {target!r} is not a linear layer of this model; choose from {', '.join(names)}"
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
  """Splits the stacked factors into one tensor per layer, as in PEFT; `stack` undoes it.

  Code that treats or names single tensors, such as HAMU, takes this form.

  Args:
    adapter: adapter in the form of `init`, or its gradient.

  Returns:
    {"layers": {"00": {path: {"lora_A": [I, r], "lora_B": [r, O]}}, ...}}, and any factors outside the
    layers. All layer numbers have as many digits as the last.
  """
  if "layers" not in adapter:
    return adapter
  count = jax.tree.leaves(adapter["layers"])[0].shape[0]
  digits = len(str(count - 1))  # Names of equal length sort in the order of the layers.
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
  """Wraps `apply` so that it uses the adapter among the variables.

  Args:
    apply: `apply` of a linen model.
    config: configuration of the adapter. Its targets are not read: the adapted layers are those for which
      the adapter has factors.
    tokens: identity of the tokens, which turns on dropout with the key `rngs={"dropout": key}`. None is
      evaluation.

  Returns:
    ({"params": base, "lora": adapter}, *args, **kwargs) -> the result of `apply`. Without "lora" it is the
    base model's.
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
  """Merges an adapter into the base: `W + (alpha / r) A B`, so that a plain model computes the same.

  Args:
    params: parameters of the base model.
    adapter: adapter in the form of `init`.
    config: configuration of the adapter, for its scaling.

  Returns:
    Parameters of the same structure, shapes and dtypes as `params`. The sum is computed in float32.
  """
  flat, factors = traverse_util.flatten_dict(params), traverse_util.flatten_dict(adapter)
  for path in {path[:-1] for path in factors}:
    a, b = factors[*path, "lora_A"], factors[*path, "lora_B"]
    flat[*path, "kernel"] = _add_product(flat[*path, "kernel"], a, b, config.scaling)
  return traverse_util.unflatten_dict(flat)


@functools.partial(jax.jit, static_argnums=3)
def _add_product(kernel, a, b, scaling):
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  change = scaling * jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
  return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)


def _is_target(path, targets):
  dotted = "." + ".".join(path)
  return any(dotted.endswith("." + target) for target in targets)


def _drop(x_BxTxI, key, tokens, rate):
  """Inverted dropout with a key for each token."""

  def keep(example, position):
    token_key = jax.random.fold_in(jax.random.fold_in(key, example), position)
    return jax.random.bernoulli(token_key, 1 - rate, x_BxTxI.shape[-1:])

  keep_BxTxI = jax.vmap(jax.vmap(keep))(tokens.example_BxT, tokens.position_BxT)
  return jnp.where(keep_BxTxI, x_BxTxI / (1 - rate), 0)
