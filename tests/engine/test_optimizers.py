"""Schedules against closed forms; optimizers against optax called by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hamu_jax.config import default as config_lib
from hamu_jax.engine import optimizers
from hamu_jax.errors import UserError


def section(**values):
  config = config_lib.optimizer_config(values.pop("name", "sgd"), 0.1)
  config.update(values)
  return config


@pytest.mark.parametrize(
  ("values", "wanted"),
  [
    ({}, {0: 1, 55: 1, 99: 1}),
    ({"schedule": "cosine"}, {0: 1, 50: 0.5, 25: (1 + 2**-0.5) / 2, 100: 0}),
    ({"schedule": "linear"}, {0: 1, 25: 0.75, 100: 0}),
    (
      {"schedule": "step", "decay_epochs": (2.0, 5.0), "decay_factor": 0.1},
      {19: 1, 20: 0.1, 49: 0.1, 50: 0.01},
    ),
    ({"warmup_epochs": 2.0}, {0: 0, 10: 0.5, 20: 1, 80: 1}),
    ({"warmup_epochs": 2.0, "schedule": "cosine"}, {10: 0.5, 20: 1, 60: 0.5, 100: 0}),
    (
      {"warmup_epochs": 1.0, "schedule": "step", "decay_epochs": (3.0,)},
      {5: 0.5, 29: 1, 30: 0.1},
    ),
  ],
)
def test_schedule_shapes(values, wanted):
  shape = optimizers.schedule_shape(section(**values), lambda epochs: 10 * epochs, total_steps=100)
  for step, factor in wanted.items():
    np.testing.assert_allclose(shape(step), factor, atol=1e-6)


def test_the_ramp_of_the_sharpness_code():
  """The rates that its FT_warmup used in two epochs of eight steps, one of them of warm-up, at rate 0.02."""
  rates = [0.002675, 0.00515, 0.007625, 0.0101, 0.012575, 0.01505, 0.017525, 0.02] + [0.02] * 8
  values = {"schedule": "ft_warmup", "warmup_epochs": 1.0}
  shape = optimizers.schedule_shape(section(**values), lambda epochs: 8 * epochs, total_steps=16)
  np.testing.assert_allclose([0.02 * shape(step) for step in range(16)], rates, rtol=1e-6)
  with pytest.raises(UserError, match="ramps up in warmup_epochs, which is 0"):
    optimizers.schedule_shape(section(schedule="ft_warmup"), lambda epochs: 8 * epochs, 16)


@pytest.mark.parametrize(
  ("values", "reference"),
  [
    ({}, optax.sgd(0.1)),
    ({"momentum": 0.9, "nesterov": True}, optax.sgd(0.1, momentum=0.9, nesterov=True)),
    (
      {"momentum": 0.9, "weight_decay": 5e-4},
      optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)),
    ),
    ({"name": "adamw", "b1": 0.8}, optax.adamw(0.1, b1=0.8, weight_decay=0.0)),
    ({"name": "adamw", "weight_decay": 0.3}, optax.adamw(0.1, weight_decay=0.3)),
    ({"name": "lion", "weight_decay": 0.0}, optax.lion(0.1, weight_decay=0.0)),
  ],
)
def test_optimizer_is_the_optax_one(values, reference):
  params = {"w": jnp.asarray([1.0, -2.0, 3.0])}
  gradients = {"w": jnp.asarray([0.5, 0.1, -0.7])}
  moved = []
  for optimizer in (optimizers.make_optimizer(section(**values), 0.1), reference):
    state, current = optimizer.init(params), params
    for _ in range(3):
      updates, state = optimizer.update(gradients, state, current)
      current = optax.apply_updates(current, updates)
    moved.append(current["w"])
  np.testing.assert_array_equal(*moved)
  assert not np.allclose(moved[0], params["w"])


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"name": "sdg"}, "'sdg': is no optimizer that can be used; choose from sgd, adam"),
    ({"name": "chain"}, "no optimizer that can be used"),
    # Parts of optimizers, noise of their own, and those that need the loss.
    ({"name": "scale_by_rprop"}, "no optimizer that can be used"),
    ({"name": "noisy_sgd"}, "no optimizer that can be used"),
    ({"name": "lbfgs"}, "no optimizer that can be used"),
    ({"name": "sgd", "nesterov": True}, "optimizer.nesterov=True: changes nothing without momentum"),
    ({"name": "sgd", "b1": 0.9}, "optimizer.b1=0.9: optax.sgd takes no such"),
  ],
)
def test_what_optax_does_not_have_is_refused(values, message):
  with pytest.raises(UserError, match=message):
    optimizers.make_optimizer(section(**values), 0.1)


def test_unknown_schedule_is_refused():
  with pytest.raises(UserError, match="'cosin': choose from constant, cosine"):
    optimizers.schedule_shape(section(schedule="cosin"), lambda epochs: 10 * epochs, 100)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimizer_descends_at_a_traced_rate(name):
  params = {"w": jnp.asarray([[1.0, -2.0], [3.0, 0.5]])}

  def step(rate, state, params):
    optimizer = optimizers.make_optimizer(section(name=name), rate)
    state = optimizer.init(params) if state is None else state
    updates, state = optimizer.update(params, state, params)  # The gradient of half the square.
    return state, optax.apply_updates(params, updates)

  state, moved = None, params
  for _ in range(5):
    state, moved = step(jnp.float32(0.05), state, moved)
  assert np.isfinite(moved["w"]).all()
  assert np.sum(moved["w"] ** 2) < np.sum(params["w"] ** 2)
