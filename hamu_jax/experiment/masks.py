"""Saliency masks: the gradient of the forget set that ranks the weights, and the mask stage."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import sam_jax
from hamu_jax import models
from hamu_jax.engine import role_gradient as role_gradient_lib
from hamu_jax.errors import UserError
from hamu_jax.run import compilation, hosts
from hamu_jax.run import stage_cache as stages

Tree = Any


def forget_gradient(forward, fetch, feed, plan, variables: Tree, *, base: Tree, microbatch: int = 0) -> Tree:
  """`|sum_b g_b|` over the batches b of the forget set, g_b the gradient of a batch's mean cross-entropy.

  The model is the original one in evaluation mode. All batches have equal weight, also a short last one.

  Args:
    forward: see `role_gradient.role_gradient`.
    fetch: see `role_gradient.role_gradient`.
    feed: `engine.feed.Feed` of the training examples.
    plan: plan whose epoch is one pass over the forget set.
    variables: variables of the original model.
    base: variables that no stage trains.
    microbatch: largest number of examples differentiated at a time; 0 takes a whole batch.

  Returns:
    Pytree of non-negative arrays, same structure as the parameters.

  Source: SalUn (arXiv 2310.12508).
  """
  gradient_of = role_gradient_lib.role_gradient(forward, fetch, ("ce",), train=False, microbatch=microbatch)
  key = jax.random.key(0)  # Nothing is drawn without augmentation.

  @compilation.jit
  def add(total, variables, base, data, index_B):
    inputs = role_gradient_lib.Inputs(base, None, data, key, key, {})
    sums = gradient_of(variables, inputs, index_B, {"ce": jnp.float32(1)})
    return jax.tree.map(lambda leaf, new: leaf + new / sums.count, total, sums.gradient)

  feed.prepare(plan, plan.steps_per_epoch)
  total = jax.tree.map(jnp.zeros_like, variables["params"])
  for step in range(plan.steps_per_epoch):
    data, batches = feed.chunk(plan, step, step + 1, None)
    total = add(total, variables, base, data, batches.indices.forget[0])
  return jax.tree.map(jnp.abs, total)


def cached_mask(
  config: ml_collections.ConfigDict,
  params: Tree,
  gradient: Callable[[], Tree],
  *,
  cache: stages.StageCache,
  key: str,
  provenance: Mapping[str, Any],
) -> tuple[Tree, dict[str, Any]]:
  """The mask of `config.fraction`, from the mask stage, which makes the masks of all `config.fractions`.

  Args:
    config: `config.mask`.
    params: parameters or their shapes.
    gradient: () -> the result of `forget_gradient`.
    cache: cache of finished stages. The record of the stage holds the number of weights of each mask and
      their share of the sum of the gradient.
    key: key of the stage.
    provenance: JSON values for the record, which identify model and data.

  Returns:
    The mask and the record of the stage.
  """
  fractions = list(config.fractions)
  began = time.monotonic()
  templates = [_like(params) for _ in fractions]
  cached = cache.load("mask", key, templates)
  if hosts.agree(cached is None):
    magnitude = gradient()
    masks = [sam_jax.saliency_mask(magnitude, f, select=config.select) for f in fractions]
    # A forget set whose gradient is zero has no shares.
    total = _sum(magnitude) or 1.0
    record = [
      {
        "fraction": fraction,
        "weights": int(_sum(mask)),
        "gradient_share": float(_sum(sam_jax.apply_mask(magnitude, mask)) / total),
      }
      for fraction, mask in zip(fractions, masks, strict=True)
    ]
    options = {name: config[name] for name in ("select", "batch_size")}
    options["seconds"] = time.monotonic() - began
    # As NumPy arrays, because every process has computed the masks on its own devices.
    cache.publish("mask", key, {**provenance, **options, "masks": record}, jax.device_get(masks))
    cached = cache.load("mask", key, templates)
  assert cached is not None  # It is in the cache now.
  masks, outcome = cached
  return masks[fractions.index(config.fraction)], outcome


def check_fractions(config: ml_collections.ConfigDict, params: Tree) -> None:
  """Raises a UserError if a mask of `config.fractions` would mark no weight.

  Args:
    config: `config.mask`.
    params: parameters or their shapes.
  """
  weights = sum(leaf.size for leaf in jax.tree.leaves(params))
  for fraction in config.fractions if config.fraction and not config.path else ():
    if not int(weights * fraction):
      raise UserError(
        f"config.mask.fractions={tuple(config.fractions)!r}: {fraction!r} of {weights} weights is none; "
        f"choose at least {1 / weights:.3g}"
      )


def read_mask(path: str, params: Tree) -> Tree:
  """Reads a mask that another run has written.

  Args:
    path: safetensors file.
    params: parameters or their shapes.

  Raises:
    UserError: it belongs to another model, or holds other values than zeros and ones.
  """
  try:
    # Read as floats: cast to integers, the weights of a model could pass for a mask.
    mask = models.load_weights(path, {"params": _like(params, np.float32)})["params"]
  except UserError as error:
    raise UserError(f"config.mask.path: {error}") from error
  if any(np.any((np.asarray(leaf) != 0) & (np.asarray(leaf) != 1)) for leaf in jax.tree.leaves(mask)):
    raise UserError(f"config.mask.path={path!r}: a mask holds zeros and ones only; give a mask.safetensors")
  return jax.tree.map(lambda leaf: leaf.astype(np.int8), mask)


def _like(params: Tree, dtype=np.int8) -> Tree:
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)


def _sum(tree: Tree) -> float:
  return sum(float(np.asarray(leaf).sum(dtype=np.float64)) for leaf in jax.tree.leaves(tree))
