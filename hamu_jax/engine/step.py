"""The one step body, and the chunk of steps that runs as a single device program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax import lax

import sam_jax
from hamu_jax.engine import methods, objectives, optimizers
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine.train_state import TrainState
from hamu_jax.models import batch_norm
from hamu_jax.paired import Paired
from hamu_jax.transforms.stop import Stop

Tree = Any

# Fields of a method's options that enter the step as data, so that one compiled program serves every
# value of them (and a sweep over them can be mapped).
TRACED = (
  "epochs",
  "clip_norm",
  "constraint",
  "constraint_ratio",
  "radius",
  "max_norm",
  "alpha",
  "beta",
  "gamma",
  "temperature",
  "retain_weight",
  "l1_weight",
  "retain_coefficient",
  "forget_coefficient",
  "preference_beta",
  "margin",
  "steering",
  "l1_free_epochs",
  "max_retain_loss",
  "min_forget_loss",
)
# Most steps of one device program: the size of its metric buffers.
CHUNK_CAPACITY = 64
_CLIP_EPS = 1e-6
# Weight of a batch in the running statistics.
_MOMENTUM = batch_norm.BatchNorm.momentum
# Where the keys of epochs are folded in: no step has this number.
_EPOCHS = 2**32 - 1

SCOPES = ("auto", "step", "role")
MASK_SCOPES = ("update", "gradient", "perturbed")


class Frozen(NamedTuple):
  """What a stage reads and never changes.

  Attributes:
    reference: variables of the original model; None if no term reads them.
    mask: zeros and ones for each parameter; None if all weights move.
    base: variables of the model that no stage trains, {} without any.
  """

  reference: Tree = None
  mask: Tree = None
  base: Tree = {}


class Batches(NamedTuple):
  """The batches of a chunk, with a leading axis of CHUNK_CAPACITY steps; of one step without it.

  Attributes:
    indices: Paired [n, B] int32 examples of each role, -1 for padding, None for a role that is not read; as
      `pairing.shard_indices` has them under `pmap`.
    epoch: [n] int32, the epoch of each step.
  """

  indices: Any
  epoch: jax.Array


class Sharpness(NamedTuple):
  """How gradients are sharpness-aware; the radius and its weight are hyperparameters (`rho`, `lamb`).

  Attributes:
    adaptive: see `sam_jax.perturbation`.
    mode: "min" or "max".
    scope: "step" perturbs both roles by the sum of their gradients, "role" each by its own; "auto" is
      "step" where an update descends one loss.
  """

  adaptive: bool = False
  mode: str = "min"
  scope: str = "auto"


class StepProgram(NamedTuple):
  """A step and what starts its state.

  Attributes:
    step: (state, Frozen, data, Batches, hyperparameters) -> (state, metrics), pure.
    optimizers: (hyperparameters) -> one optax transformation for each of `Method.optimizers`.
  """

  step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
  optimizers: Callable[..., tuple[optax.GradientTransformation, ...]]


def hyperparameters_of(options: ml_collections.ConfigDict, sam: Any = None) -> dict[str, float | None]:
  """The values of a stage's options that enter its step as data; None switches a feature off.

  Args:
    options: `config.train` or `config.method`.
    sam: {"rho", "lamb"} of sharpness-aware gradients, or None for plain ones.
  """
  hyperparameters = {name: options[name] for name in TRACED if name in options}
  hyperparameters["clip_norm"] = hyperparameters["clip_norm"] or None
  hyperparameters["learning_rate"] = options.optimizer.learning_rate
  return hyperparameters | ({name: float(sam[name]) for name in ("rho", "lamb")} if sam else {})


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
  microbatch: int = 0,
  together: tuple[str, ...] = (),
  sharpness: Sharpness | None = None,
  mask_scope: str | None = None,
) -> StepProgram:
  """Builds the step of any method.

  Each sub-step computes the gradients of its roles, sharpness-aware where that is asked for, masks and
  clips each, lets the transform make one equivalent gradient of them and the base optimizer apply it.
  The step is then accepted whole or rejected whole: if the transform stopped, a loss crossed its
  threshold or anything is not finite, the state it returns is the old one with `stop` set.

  Args:
    method: a row of `methods.METHODS`.
    options: `config.method`, or `config.train` for training.
    forward: (variables, batch, key, train) -> (`objectives.Outputs`, batch_stats).
    fetch: (data, indices [B], key) -> batch.
    pairing: `sequential`, `vmap` or `pmap`.
    train: whether the model runs in training mode: batch norm on batch statistics, dropout on.
    schedule: step count -> multiple of the peak learning rate.
    microbatch: see `objectives.role_gradient`.
    together: see `objectives.role_gradient`; for `pmap`.
    sharpness: None takes plain gradients.
    mask_scope: None moves all weights; "update" keeps what the mask excludes exactly where it is;
      "gradient" masks the gradient alone, so that weight decay still moves them; "perturbed" masks
      only the gradient at the perturbed point, as the sharpness paper's code does.
  """

  def role_function(terms):
    return objectives.role_gradient(
      forward, fetch, terms, train=train, microbatch=microbatch, together=together
    )

  builders = [
    _SubStepBuilder(
      substep,
      options,
      role_function,
      pairing,
      train,
      schedule,
      sharpness,
      mask_scope,
      bool(together),
    )
    for substep in method.substeps
  ]
  # One transform and base optimizer for each name; sub-steps of one name have the same.
  by_name = {substep.optimizer: builder for substep, builder in zip(method.substeps, builders)}

  def optimizers_of(hyperparameters):
    return tuple(by_name[name].optimizer(hyperparameters) for name in method.optimizers)

  def run_substep(builder, state, frozen, inputs, indices, epoch):
    """-> updated state, metrics, stop code."""
    slot = method.optimizers.index(builder.substep.optimizer)
    params, batch_stats, opt_state, metrics, stop = builder.apply(
      state.variables, state.opt_state[slot], frozen, inputs, indices, epoch
    )
    opt_states = (*state.opt_state[:slot], opt_state, *state.opt_state[slot + 1 :])
    proposed = state.replace(params=params, batch_stats=batch_stats, opt_state=opt_states)
    return proposed, metrics, stop

  def run_pass(builder, state, frozen, inputs, indices, epoch):
    """`run_substep` where its batch is not all padding."""
    (role,) = builder.substep.roles
    active = pairing_lib.anywhere(getattr(indices, role) >= 0, pairing)

    def run():
      return run_substep(builder, state, frozen, inputs, indices, epoch)

    def skip():
      zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run))
      return state, *zeros[1:]

    state, metrics, stop = lax.cond(active, run, skip)
    return state, metrics | {f"{role}_active": active}, stop

  def step(state, frozen, data, batches, hyperparameters):
    key = jax.random.wrap_key_data(state.rng)
    inputs = objectives.Inputs(
      frozen.base,
      frozen.reference,
      data,
      jax.random.fold_in(key, state.step),
      jax.random.fold_in(jax.random.fold_in(key, _EPOCHS), batches.epoch),
      hyperparameters,
    )
    proposed, metrics = state, {}
    stop = jnp.asarray(Stop.NONE, jnp.int32)
    for builder in builders:
      run = run_pass if method.layout == "passes" else run_substep
      proposed, substep_metrics, substep_stop = run(
        builder, proposed, frozen, inputs, batches.indices, batches.epoch
      )
      if len(builders) > 1:
        (role,) = builder.substep.roles
        substep_metrics[f"{role}_update_norm"] = substep_metrics.pop("update_norm")
      metrics |= substep_metrics
      stop = jnp.where(stop == Stop.NONE, substep_stop, stop).astype(jnp.int32)
    accepted = stop == Stop.NONE
    metrics["learning_rate"] = jnp.asarray(hyperparameters["learning_rate"] * schedule(state.step))
    metrics["stop"] = stop
    proposed = proposed.replace(step=state.step + 1)
    # A zero gradient alone would still move AdamW, so a rejected step returns the whole old state.
    state = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), proposed, state)
    return state.replace(stop=stop), metrics

  return StepProgram(step, optimizers_of)


class _SubStepBuilder:
  """One sub-step of a method, as pure functions."""

  def __init__(
    self, substep, options, role_function, pairing, train, schedule, sharpness, mask_scope, together
  ):
    self.substep = substep
    self._options = options
    self._schedule = schedule
    self._train = train
    self._sharpness = sharpness
    if sharpness and substep.mode:
      self._sharpness = sharpness._replace(mode=options[substep.mode])
    # Without a perturbed point there is just the one gradient to mask.
    self._mask_scope = "gradient" if mask_scope == "perturbed" and not sharpness else mask_scope
    scope = sharpness.scope if sharpness else "step"
    self._by_role = scope == "role" or (scope == "auto" and not substep.one_loss)

    # The hyperparameters and the mask that `sharpen` needs are known only inside a step.
    self._gradients = lambda sharpen: pairing_lib.make_gradients(
      pairing, role_function, substep.terms, train=train, sharpen=sharpen, together=together
    )

  def optimizer(self, hyperparameters):
    """The transform and the base optimizer it feeds."""

    def learning_rate(count):
      return hyperparameters["learning_rate"] * self._schedule(count)

    return optax.chain(
      self.substep.transform(self._options, learning_rate, hyperparameters),
      optimizers.make_optimizer(self._options.optimizer, learning_rate),
    )

  def apply(self, variables, opt_state, frozen, inputs, indices, epoch):
    """-> params, batch_stats, opt_state, metrics, stop code."""
    hyperparameters, params = inputs.hyperparameters, variables["params"]
    mask = self._mask(frozen)
    means = self._means(variables, inputs, indices, epoch, mask)
    if mask is not None and self._mask_scope != "perturbed":
      means = jax.tree.map(
        lambda mean: mean._replace(gradient=sam_jax.apply_mask(mean.gradient, mask)),
        means,
        is_leaf=_is_means,
      )
    clipped, metrics = _clipped_gradients(means, hyperparameters["clip_norm"])
    updates, opt_state = self.optimizer(hyperparameters).update(
      clipped.retain, opt_state, params, forget_grads=clipped.forget
    )
    if mask is not None and self._mask_scope == "update":
      updates = sam_jax.apply_mask(updates, mask)
    metrics["update_norm"] = optax.tree.norm(updates)
    stop = _stop_code(opt_state[0], metrics, self._options, hyperparameters)
    if hasattr(opt_state[0], "diagnostics"):
      metrics |= opt_state[0].diagnostics._asdict()
    batch_stats = variables["batch_stats"]
    if self._train:
      batch_stats = _running_statistics(batch_stats, means)
    return optax.apply_updates(params, updates), batch_stats, opt_state, metrics, stop

  def _mask(self, frozen: Frozen):
    """The mask of the weights that this sub-step moves, or None."""
    if self._mask_scope is None:
      return None
    return frozen.mask if self.substep.moves == "salient" else sam_jax.complement(frozen.mask)

  def _means(self, variables, inputs, indices, epoch, mask) -> Paired:
    """The means of both roles over their batches, with sharpness-aware gradients where asked for."""
    coefficients = self.substep.coefficients(inputs.hyperparameters, epoch)

    def sharpen(at):
      return self._sharpen(at, inputs.hyperparameters, mask)

    if self._by_role:
      return self._gradients(sharpen)(variables, inputs, indices, coefficients)
    gradients = self._gradients(lambda at: at)

    def at(params, coefficients):
      return gradients({**variables, "params": params}, inputs, indices, coefficients)

    return sharpen(at)(variables["params"], coefficients)

  def _sharpen(self, at, hyperparameters, mask):
    """(params, coefficients) -> means, a role's or both roles', with sharpness-aware gradients."""
    if self._sharpness is None:
      return at

    def gradients_and_means(means):
      return [mean.gradient for mean in jax.tree.leaves(means, is_leaf=_is_means)], means

    def perturbed(params, coefficients):
      gradients, means = gradients_and_means(at(params, coefficients))
      if mask is not None and self._mask_scope == "perturbed":
        gradients = [sam_jax.apply_mask(gradient, mask) for gradient in gradients]
      return gradients, means

    def sharp(params, coefficients):
      clean = jax.tree.map(
        objectives.clean_coefficients, coefficients, is_leaf=lambda node: isinstance(node, dict)
      )
      gradients, means = sam_jax.sharpness_aware(
        lambda point: gradients_and_means(at(point, clean)),
        perturbed_grad_fn=lambda point: perturbed(point, coefficients),
        rho=hyperparameters["rho"],
        lamb=hyperparameters["lamb"],
        adaptive=self._sharpness.adaptive,
        mode=self._sharpness.mode,
        has_aux=True,
        direction=_sum_of_trees,
      )(params)
      gradients = iter(gradients)
      return jax.tree.map(lambda mean: mean._replace(gradient=next(gradients)), means, is_leaf=_is_means)

    return sharp


def _is_means(node) -> bool:
  return isinstance(node, pairing_lib.RoleMeans)


def _sum_of_trees(trees):
  return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def _running_statistics(before: Tree, means: Paired) -> Tree:
  """The running statistics after the retain and then the forget batch.

  Each role moved them from the same start: s_r = s + m (b_r - s) and s_f alike. One after the other they
  are (1 - m) s_r + m b_f = s_f + (1 - m) (s_r - s).
  """
  present = [mean.batch_stats for mean in means if mean is not None]
  if len(present) == 1:
    return present[0]
  return jax.tree.map(lambda s, s_r, s_f: s_f + (1 - _MOMENTUM) * (s_r - s), before, *present)


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


def _stop_code(transform_state, metrics, options, hyperparameters):
  """The `Stop` code of an update: what is not finite first, then the transform's, then a loss's."""
  stop = jnp.asarray(Stop.NONE, jnp.int32)
  if options.get("stop_on_loss"):
    if "forget_loss" in metrics:
      stop = jnp.where(metrics["forget_loss"] < hyperparameters["min_forget_loss"], Stop.FORGET_LOSS, stop)
    if "retain_loss" in metrics:
      stop = jnp.where(metrics["retain_loss"] > hyperparameters["max_retain_loss"], Stop.RETAIN_LOSS, stop)
  if hasattr(transform_state, "stop"):
    stop = jnp.where(transform_state.stop == Stop.NONE, stop, transform_state.stop)
  # A gradient that is not finite has a norm that is not.
  finite = jnp.all(jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))))
  return jnp.where(finite, stop, Stop.NONFINITE).astype(jnp.int32)


def make_chunk(step):
  """Runs up to `CHUNK_CAPACITY` steps as one device program.

  Returns:
    (state, Frozen, data, Batches, count, hyperparameters) -> (state, metrics, done). The batches have a
    leading axis of CHUNK_CAPACITY, of which the first `count` (int32 scalar, data) are run, fewer if a step stops;
    metrics are stacked along the same axis and `done` says how many of them are filled. The number of
    steps being data, one compilation serves every chunk of a stage.
  """

  def chunk(state, frozen, data, batches, count, hyperparameters):
    def one(state, index):
      step_batches = jax.tree.map(lambda leaf: leaf[index], batches)
      return step(state, frozen, data, step_batches, hyperparameters)

    _, shapes = jax.eval_shape(one, state, jnp.zeros([], jnp.int32))
    buffers = jax.tree.map(lambda leaf: jnp.zeros((CHUNK_CAPACITY, *leaf.shape), leaf.dtype), shapes)

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


def compile_target(
  chunk,
  mesh: jax.sharding.Mesh | None,
  roles: tuple[str, ...],
  *,
  members: int = 0,
  separate_indices: bool = False,
  sharded_data: bool = False,
  base_specs: Tree = jax.sharding.PartitionSpec(),
):
  """The jitted chunk: as it is, over models that are trained together, or over the devices of a mesh.

  Args:
    chunk: as `make_chunk` builds it.
    mesh: of `pmap`; None for one device.
    roles: the roles whose examples the batches have.
    members: if not 0, as many states, references, masks, hyperparameters and metrics, all with a leading
      axis, are mapped over.
    separate_indices: whether each of them has its own examples, [n, members, B]; else all have the same.
    sharded_data: whether each device of the mesh has data of its own, of which the leaves have leading
      axes [roles, devices a role]; else all have the same.
    base_specs: how `Frozen.base` lies on the mesh.
  """
  if members:
    batches = Batches(indices=1 if separate_indices else None, epoch=None)
    return jax.jit(jax.vmap(chunk, in_axes=(0, Frozen(0, 0, None), None, batches, None, 0)))
  if mesh is None:
    return jax.jit(chunk)
  spec = jax.sharding.PartitionSpec
  sharded_rows = spec(None, pairing_lib.ROLE_AXIS, pairing_lib.SHARE_AXES)
  frozen_spec = Frozen(spec(), spec(), base_specs)
  data_spec = spec(pairing_lib.ROLE_AXIS, pairing_lib.SHARE_AXES) if sharded_data else spec()

  def device_chunk(state, frozen, data, batches, count, hyperparameters):
    if sharded_data:
      data = jax.tree.map(lambda leaf: leaf[0, 0], data)
    batches = batches._replace(indices=pairing_lib.own_indices(batches.indices, roles, mesh))
    return chunk(state, frozen, data, batches, count, hyperparameters)

  return jax.jit(
    jax.shard_map(
      device_chunk,
      mesh=mesh,
      in_specs=(
        spec(),
        frozen_spec,
        data_spec,
        Batches(indices=sharded_rows, epoch=spec()),
        spec(),
        spec(),
      ),
      out_specs=spec(),
      # The step's results are equal on every device by construction (each holds both reduced
      # gradients), which the checker cannot see through `ppermute`.
      check_vma=False,
    )
  )
