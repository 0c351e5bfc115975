"""Optax optimizers and schedules from their section of the configuration.

The peak learning rate may be traced. All other fields are part of the program.
"""

import inspect
from collections.abc import Callable

import jax.numpy as jnp
import ml_collections
import optax

from hamu_jax.errors import UserError

# "ft_warmup" is the ramp of the sharpness paper's code, for comparison with its numbers: it begins above 0,
# and the last step of the warm-up has the whole rate, which then stays.
SCHEDULES = ("constant", "cosine", "linear", "step", "ft_warmup")
_FT_WARMUP_START = 0.01
# Those that take a step from a gradient alone. Others need the loss (lbfgs, polyak_sgd), add noise of their
# own (noisy_sgd, dpsgd), or are parts of optimizers (scale_by_*).
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  name: getattr(optax, name)
  for name in (
    *("sgd", "adam", "adamw", "lion", "rmsprop", "lamb", "lars", "adabelief", "adadelta", "adafactor"),
    *("adagrad", "adamax", "adamaxw", "adan", "amsgrad", "fromage", "nadam", "nadamw", "novograd"),
    *("optimistic_adam", "optimistic_gradient_descent", "radam", "sign_sgd", "signum", "sm3", "yogi"),
  )
}
_HYPERPARAMETERS = ("momentum", "nesterov", "b1", "b2", "eps")


def schedule_shape(config: ml_collections.ConfigDict, position, total_steps: int):
  """The schedule as a multiple of the peak rate.

  Args:
    config: optimizer section, of which `schedule` and the fields about epochs and decay are read.
    position: (epochs) -> number of steps in so many epochs.
    total_steps: step at which `cosine` and `linear` reach 0.

  Returns:
    (step count) -> factor of the peak rate.
  """
  warmup = round(position(config.warmup_epochs))
  rest = max(total_steps - warmup, 1)
  match config.schedule:
    case "constant":
      shape = optax.constant_schedule(1.0)
    case "cosine":
      shape = optax.cosine_decay_schedule(1.0, rest)
    case "linear":
      shape = optax.linear_schedule(1.0, 0.0, rest)
    case "step":
      # Boundaries count from the start of training; `join_schedules` counts from the end of warm-up.
      shape = optax.piecewise_constant_schedule(
        1.0,
        {round(position(epoch)) - warmup: config.decay_factor for epoch in config.decay_epochs},
      )
    case "ft_warmup":
      if not warmup:
        raise UserError("optimizer.schedule='ft_warmup': ramps up in warmup_epochs, which is 0; set it")
      return lambda count: 1 - (1 - _FT_WARMUP_START) * jnp.maximum(1 - (count + 1) / warmup, 0)
    case _:
      raise UserError(f"optimizer.schedule={config.schedule!r}: choose from {', '.join(SCHEDULES)}")
  if not warmup:
    return shape
  return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), shape], [warmup])


def make_optimizer(config: ml_collections.ConfigDict, learning_rate) -> optax.GradientTransformation:
  """The optax optimizer that applies an equivalent gradient.

  Args:
    config: optimizer section, see `config.optimizer_config`.
    learning_rate: optax schedule or (traced) scalar.

  Raises:
    UserError: optax has no such optimizer, or it does not take a hyperparameter that is set.
  """
  choices = ", ".join(OPTIMIZERS)
  if config.name not in OPTIMIZERS:
    raise UserError(
      f"optimizer.name={config.name!r}: is no optimizer that can be used; choose from {choices}"
    )
  factory = OPTIMIZERS[config.name]
  parameters = inspect.signature(factory).parameters
  given = {name: config[name] for name in _HYPERPARAMETERS if config[name] is not None}
  unknown = sorted(set(given) - set(parameters))
  if unknown:
    takes = ", ".join(name for name in _HYPERPARAMETERS if name in parameters)
    raise UserError(
      f"optimizer.{unknown[0]}={given[unknown[0]]!r}: optax.{config.name} takes no such "
      f"hyperparameter; leave it unset; it takes {takes or 'none'}"
    )
  if given.get("nesterov") and "momentum" in parameters and not given.get("momentum"):
    raise UserError("optimizer.nesterov=True: changes nothing without momentum; set optimizer.momentum, too")
  if "weight_decay" in parameters:
    return factory(learning_rate, weight_decay=config.weight_decay, **given)
  optimizer = factory(learning_rate, **given)
  if not config.weight_decay:
    return optimizer
  return optax.chain(optax.add_decayed_weights(config.weight_decay), optimizer)
