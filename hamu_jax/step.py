"""The one step body, and the chunk of steps that runs as a single device program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax import lax

from hamu_jax import methods, objectives, optimizers
from hamu_jax import pairing as pairing_lib
from hamu_jax.paired import Paired
from hamu_jax.train_state import TrainState
from hamu_jax.transforms.stop import Stop

Tree = Any

# Fields of a method's options that enter the step as data, so that one compiled program serves every
# value of them (and a sweep over them can be mapped).
_TRACED = (
    "clip_norm",
    "constraint",
    "constraint_ratio",
    "radius",
    "max_norm",
    "alpha",
    "gamma",
    "max_retain_loss",
    "min_forget_loss",
)
# Most steps of one device program: the size of its metric buffers.
CHUNK_CAPACITY = 64
_CLIP_EPS = 1e-6


def settings_of(options: ml_collections.ConfigDict) -> dict[str, float | None]:
  """The values of a stage's options that enter its step as data; None switches a feature off."""
  settings = {name: options[name] for name in _TRACED if name in options}
  settings["clip_norm"] = settings["clip_norm"] or None
  settings["learning_rate"] = options.optimizer.learning_rate
  return settings


class StepProgram(NamedTuple):
  """A step and what starts its state.

  Attributes:
    step: (state, reference, data, rows, settings) -> (state, metrics), pure.
    optimizers: (settings) -> one optax transformation per sub-step.
  """

  step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
  optimizers: Callable[..., tuple[optax.GradientTransformation, ...]]


def clip(gradient: Tree, norm: jax.Array, max_norm: float | None) -> Tree:
  """Scales by `min(1, max_norm / (norm + 1e-6))`, PyTorch's `clip_grad_norm_`.

  Args:
    gradient: pytree of arrays.
    norm: scalar, its global norm.
    max_norm: None leaves the gradient as it is.
  """
  if max_norm is None:
    return gradient
  factor = jnp.minimum(1, max_norm / (norm + _CLIP_EPS))
  return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), gradient)


def make_step(
    method: methods.Method,
    options: ml_collections.ConfigDict,
    *,
    forward,
    fetch,
    pairing: str,
    train: bool,
    schedule,
) -> StepProgram:
  """Builds the step of any method.

  Each sub-step computes the gradients of its roles, clips each by its norm, lets the transform make one
  equivalent gradient of them and the base optimizer apply it. The step is then accepted whole or
  rejected whole: if the transform stopped, a loss crossed its threshold or anything is not finite, the
  state it returns is the old one with `stop` set.

  Args:
    method: a row of `methods.METHODS`.
    options: `config.method`, or `config.train` for training.
    forward: (variables, batch, key, train) -> (logits [B, C], batch_stats).
    fetch: (data, rows [B], key) -> batch.
    pairing: `sequential`, `vmap` or `pmap`.
    train: whether batch norm runs on batch statistics.
    schedule: step count -> multiple of the peak learning rate.
  """

  def learning_rate_of(settings):
    return lambda count: settings["learning_rate"] * schedule(count)

  def optimizers_of(settings):
    learning_rate = learning_rate_of(settings)
    return tuple(
        optax.chain(
            substep.transform(options, learning_rate, settings),
            optimizers.make_optimizer(options.optimizer, learning_rate),
        )
        for substep in method.substeps
    )

  def role_function(terms):
    return objectives.role_gradient(
        forward, fetch, terms, train=train, microbatch=options.get("microbatch", 0)
    )

  gradient_functions = [
      pairing_lib.make_gradients(pairing, role_function, substep.terms) for substep in method.substeps
  ]

  def apply_substep(index, state, reference, data, rows, key, settings):
    """-> updated state, metrics, stop code."""
    coefficients = method.substeps[index].coefficients(settings)
    means = gradient_functions[index](state.variables, reference, data, rows, coefficients, key)
    clipped, metrics = _clipped_gradients(means, settings["clip_norm"])
    optimizer = optimizers_of(settings)[index]
    updates, opt_state = optimizer.update(
        clipped.retain, state.opt_state[index], state.params, forget_grads=clipped.forget
    )
    metrics["update_norm"] = optax.tree.norm(updates)
    stop = _stop_code(opt_state[0], metrics, options, settings)
    if hasattr(opt_state[0], "diagnostics"):
      metrics |= opt_state[0].diagnostics._asdict()
    (trained,) = [mean for mean in means if mean is not None] if train else (None,)
    state = state.replace(
        params=optax.apply_updates(state.params, updates),
        batch_stats=trained.batch_stats if train else state.batch_stats,
        opt_state=(*state.opt_state[:index], opt_state, *state.opt_state[index + 1 :]),
    )
    return state, metrics, stop

  def step(state, reference, data, rows, settings):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    proposed, metrics = state, {}
    stop = jnp.asarray(Stop.NONE, jnp.int32)
    for index in range(len(method.substeps)):
      proposed, substep_metrics, substep_stop = apply_substep(
          index, proposed, reference, data, rows, key, settings
      )
      metrics |= substep_metrics
      stop = jnp.where(stop == Stop.NONE, substep_stop, stop).astype(jnp.int32)
    accepted = stop == Stop.NONE
    metrics["learning_rate"] = jnp.asarray(learning_rate_of(settings)(state.step))
    metrics["stop"] = stop
    proposed = proposed.replace(step=state.step + 1)
    # A zero gradient alone would still move AdamW, so a rejected step returns the whole old state.
    state = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), proposed, state)
    return state.replace(stop=stop), metrics

  return StepProgram(step, optimizers_of)


def _clipped_gradients(means: Paired, max_norm):
  """-> Paired clipped gradients, {name: scalar} of what is logged of each role."""
  metrics = {}

  def one(role, mean):
    if mean is None:
      return None
    norm = optax.tree.norm(mean.gradient)
    for name, value in mean.values.items():
      metrics[f"{role}_{'loss' if name == 'ce' else name}"] = value
    metrics[f"{role}_grad_norm"] = norm
    return clip(mean.gradient, norm, max_norm)

  return Paired(*(one(role, mean) for role, mean in means._asdict().items())), metrics


def _stop_code(transform_state, metrics, options, settings):
  """The `Stop` code of an update: what is not finite first, then the transform's, then a loss's."""
  stop = jnp.asarray(Stop.NONE, jnp.int32)
  if options.get("stop_on_loss"):
    if "forget_loss" in metrics:
      stop = jnp.where(metrics["forget_loss"] < settings["min_forget_loss"], Stop.FORGET_LOSS, stop)
    if "retain_loss" in metrics:
      stop = jnp.where(metrics["retain_loss"] > settings["max_retain_loss"], Stop.RETAIN_LOSS, stop)
  if hasattr(transform_state, "stop"):
    stop = jnp.where(transform_state.stop == Stop.NONE, stop, transform_state.stop)
  # A gradient that is not finite has a norm that is not.
  finite = jnp.all(jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))))
  return jnp.where(finite, stop, Stop.NONFINITE)


def make_chunk(step):
  """Runs up to `CHUNK_CAPACITY` steps as one device program.

  Returns:
    (state, reference, data, rows, count, settings) -> (state, metrics, done). `rows` has a leading axis
    of CHUNK_CAPACITY, of which the first `count` (int32 scalar, data) are run, fewer if a step stops;
    metrics are stacked along the same axis and `done` says how many of them are filled. The number of
    steps being data, one compilation serves every chunk of a stage.
  """

  def chunk(state, reference, data, rows, count, settings):
    def one(state, index):
      step_rows = jax.tree.map(lambda leaf: leaf[index], rows)
      return step(state, reference, data, step_rows, settings)

    _, shapes = jax.eval_shape(one, state, jnp.zeros([], jnp.int32))
    buffers = jax.tree.map(
        lambda leaf: jnp.zeros((CHUNK_CAPACITY, *leaf.shape), leaf.dtype), shapes
    )

    def running(carry):
      state, _, index = carry
      return (index < count) & (state.stop == Stop.NONE)

    def body(carry):
      state, buffers, index = carry
      state, metrics = one(state, index)
      buffers = jax.tree.map(lambda buffer, value: buffer.at[index].set(value), buffers, metrics)
      return state, buffers, index + 1

    return lax.while_loop(running, body, (state, buffers, jnp.zeros([], jnp.int32)))

  return chunk


def compile_target(chunk, pairing: str, mesh: jax.sharding.Mesh | None):
  """The jitted chunk: as it is, or as one `shard_map` over the devices of the mesh."""
  if pairing != "pmap":
    return jax.jit(chunk)
  spec = jax.sharding.PartitionSpec
  sharded_rows = spec(None, pairing_lib.ROLE_AXIS, pairing_lib.DATA_AXIS)

  def device_chunk(state, reference, data, rows, count, settings):
    return chunk(state, reference, data, pairing_lib.own_shard(rows), count, settings)

  return jax.jit(
      jax.shard_map(
          device_chunk,
          mesh=mesh,
          in_specs=(spec(), spec(), spec(), sharded_rows, spec(), spec()),
          out_specs=spec(),
          # The step's results are equal on every device by construction (each holds both reduced
          # gradients), which the checker cannot see through `ppermute`.
          check_vma=False,
      )
  )
