"""Running statistics of a sub-step that pairs both roles, whatever the momentum of the model's layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hamu_jax.config import default as config_lib
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import methods, pairing, placement, sub_step
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.objectives import Outputs
from hamu_jax.engine.train_state import create_state
from hamu_jax.paired import Paired

RNG = np.random.default_rng(0)
DATA = {
  "x": RNG.normal(1.0, 2.0, (12, 5)).astype(np.float32),
  "label": RNG.integers(3, size=12).astype(np.int32),
}
BATCHES = Paired(np.arange(6, dtype=np.int32), np.arange(6, 12, dtype=np.int32))


class Net(nn.Module):
  """Layers of different momentum: Flax's own default, and two others."""

  @nn.compact
  def __call__(self, x, train):
    for momentum in (0.99, 0.25, 0.9):
      x = nn.Dense(5)(nn.BatchNorm(use_running_average=not train, momentum=momentum)(x))
    return nn.Dense(3)(x)


def forward(variables, batch, key, train):
  del key
  logits, updated = Net().apply(variables, batch["x"], train, mutable=["batch_stats"])
  return Outputs(logits), updated["batch_stats"]


def fetch(data, indices, key):
  del key
  return {name: leaf[indices] for name, leaf in data.items()} | {"mask": indices >= 0}


@pytest.mark.parametrize("kind", ["sequential", "vmap", "pmap"])
def test_they_are_those_of_retain_and_then_forget(kind):
  method, options = methods.METHODS["gdiff"], config_lib.default_config().method
  program = step_lib.make_step(
    method,
    options,
    forward=forward,
    fetch=fetch,
    pairing=kind,
    train=True,
    schedule=optax.constant_schedule(1.0),
  )
  variables = dict(Net().init(jax.random.key(0), DATA["x"], False))
  hyperparameters = hyperparameters_of(options, method)
  mesh = pairing.make_mesh(jax.devices()[:2], 2) if kind == "pmap" else None
  chunk = chunk_lib.compile_target(chunk_lib.make_chunk(program.step), mesh, method.roles)
  state = create_state(variables, program.optimizers(hyperparameters), seed=0)
  state, frozen, data = placement.place((state, sub_step.Frozen(), DATA), mesh)
  indices = Paired(*(role[None] for role in BATCHES))
  batches = placement.place_batches(
    pairing.shard_indices(indices, mesh) if mesh else indices, np.zeros(1, np.int32), mesh
  )
  state, _, _ = jax.device_get(chunk(state, frozen, data, batches, jnp.int32(1), hyperparameters))

  # The definition: the parameters of the start, one batch after the other.
  wanted = variables
  for role in BATCHES:
    _, updated = Net().apply(wanted, DATA["x"][role], True, mutable=["batch_stats"])
    wanted = {"params": variables["params"], **updated}
  for path, leaf in jax.tree.leaves_with_path(wanted["batch_stats"]):
    got = state.batch_stats
    for part in path:
      got = got[part.key]
    np.testing.assert_allclose(got, leaf, rtol=2e-5, atol=1e-6, err_msg=str(path))
