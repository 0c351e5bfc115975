"""The state starts at step 0 with nothing shared between optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hamu_jax.engine.train_state import create_state
from hamu_jax.transforms.stop import Stop


def test_a_new_state():
  params = {"w": jnp.ones((2, 3))}
  state = create_state({"params": params}, (optax.sgd(0.1, momentum=0.9), optax.sgd(0.1)), seed=3)
  assert int(state.step) == 0
  assert int(state.stop) == Stop.NONE
  assert state.batch_stats == {}
  assert state.variables == {"params": params, "batch_stats": {}}
  assert len(state.opt_state) == 2
  np.testing.assert_array_equal(state.rng, jax.random.key_data(jax.random.key(3)))
