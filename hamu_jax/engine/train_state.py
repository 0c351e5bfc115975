"""Immutable training state."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from hamu_jax.transforms.stop import Stop

Tree = Any


class TrainState(struct.PyTreeNode):
  """All state that a step reads and writes.

  Attributes:
    step: int32 [], steps applied so far. A rejected step does not count.
    stop: int32 [], a `Stop` code; once nonzero no further step is applied.
    params: trainable parameters.
    batch_stats: batch-norm running statistics ({} for a model without any).
    opt_state: tuple of one optimizer state for each of `Method.optimizers`.
    rng: key of the run; step t uses `fold_in(rng, t)`, so resuming needs no other state.
  """

  step: jax.Array
  stop: jax.Array
  params: Tree
  batch_stats: Tree
  opt_state: Tree
  rng: jax.Array

  @property
  def variables(self) -> dict[str, Tree]:
    """The collections that `model.apply` takes."""
    return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(variables: dict[str, Tree], optimizers, seed: int) -> TrainState:
  """A state at step 0.

  Args:
    variables: `{"params": ..., "batch_stats": ...}`; the latter may be missing.
    optimizers: one optax transformation for each of `Method.optimizers`.
    seed: seed of the run's key.
  """
  params = variables["params"]
  return TrainState(
    step=jnp.zeros([], jnp.int32),
    stop=jnp.asarray(Stop.NONE, jnp.int32),
    params=params,
    batch_stats=variables.get("batch_stats", {}),
    opt_state=tuple(optimizer.init(params) for optimizer in optimizers),
    rng=jax.random.key_data(jax.random.key(seed)),
  )
