"""The first unlearning steps of an experiment, computed at the original model and not taken.

`Preview` computes the gradients of a batch pair, the step that a method would take with them, and the losses
after that step. Its programs use the loop's own step and the experiment's pairing, so that its results are
those of the run.
"""

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

import sam_jax
from hamu_jax.analysis import alignment
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import loop as loop_lib
from hamu_jax.engine import methods, sub_step
from hamu_jax.engine import stage as stage_lib
from hamu_jax.engine.placement import place
from hamu_jax.engine.train_state import create_state
from hamu_jax.errors import UserError
from hamu_jax.experiment import experiment
from hamu_jax.paired import Paired
from hamu_jax.run import preemption
from hamu_jax.transforms.stop import Stop

Tree = Any
# Hardness is defined by both plain losses, whatever the method, because HAMU combines their gradients.
_BOTH = methods.SubStep({"ce": 1.0}, {"ce": 1.0}, methods.PLAIN, one_loss=False)
# A single role, so that one program serves both roles.
_ONE = methods.SubStep({"ce": 1.0}, None, methods.PLAIN)
# The method whose batch pairs are used for a method that reads none.
_PAIRED = "hamu-q"


class Captured(NamedTuple):
  """State of `capture`."""

  gradients: Paired


class Pair(NamedTuple):
  """A batch pair at the original model.

  Attributes:
    number: number of the step that reads it, from 0.
    gradients: Paired plain gradients of the mean cross-entropies.
    seen: Paired gradients of the same losses as passed to HAMU: sharpness-aware, masked and clipped if
      the configuration says so.
    losses: Paired mean cross-entropies in nats.
  """

  number: int
  gradients: Paired
  seen: Paired
  losses: Paired


class Step(NamedTuple):
  """A step that a method would take.

  Attributes:
    update: change of the parameters.
    stop: reason for which it would not be taken; `Stop.NONE` if it would.
    norms: Paired norms of the gradients that are passed to its transform; None for a role without gradient.
  """

  update: Tree
  stop: Stop
  norms: Paired


def capture() -> optax.GradientTransformationExtraArgs:
  """A transform that stores its input gradients in its state and returns zero updates."""

  def init_fn(params):
    return Captured(Paired(*(jax.tree.map(jnp.zeros_like, params) for _ in Paired._fields)))

  def update_fn(retain_grads, state, params=None, *, forget_grads, **extra_args):
    del state, params, extra_args
    given = Paired(retain_grads, forget_grads)
    zeros = jax.tree.map(jnp.zeros_like, retain_grads if forget_grads is None else forget_grads)
    # A role without gradients gets zeros, so that the structure is the same for all methods.
    return zeros, Captured(Paired(*(zeros if gradient is None else gradient for gradient in given)))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def can_step(name: str) -> bool:
  """Whether a method's first step is one update computed from the gradients of one batch of each role."""
  method = methods.METHODS[name]
  return len(method.substeps) == 1 and method.layout == "paired" and method.unlearns


class Preview:
  """An experiment, up to its first unlearning steps.

  Attributes:
    names: names of the tensors, in tree-leaf order.
    sizes: number of weights of each tensor.
    most_pairs: number of batch pairs of an epoch.
    warms_up: whether the learning rate of the first step is 0, so that the peak rate is used instead.

  Args:
    config: validated configuration.
    workdir: folder of the run. The original model is read from and written to the same place as by the run.
    watch: watch that notices signals.

  Raises:
    UserError: if the experiment cannot run, or its learning rate is 0.
    preemption.Preempted: if it was asked to end; its progress is saved.
  """

  def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path, watch: preemption.Watch):
    config = config.copy_and_resolve_references()
    reads_pairs = can_step(config.method.name) and len(methods.METHODS[config.method.name].roles) == 2
    if not reads_pairs:
      config.method.name = _PAIRED
    self._watch = watch
    start = experiment.Experiment(config, workdir, watch, record=False).start()
    self._loop, self._frozen = start.loop, start.frozen
    self._variables = jax.device_get(start.original)

    options = config.method
    optimizer = options.optimizer
    self.warms_up = bool(optimizer.warmup_epochs)
    # Every pair is treated as that of the first step, and no loss threshold may hide its gradients.
    optimizer.schedule, optimizer.warmup_epochs, options.stop_on_loss = "constant", 0.0, False
    self._stage = start.stage._replace(options=options)
    self.names = alignment.tensor_names(self._variables["params"])
    self.sizes = [leaf.size for leaf in jax.tree.leaves(self._variables["params"])]
    self.most_pairs = self._stage.plan.steps_per_epoch

    plain = self._stage._replace(options=options.copy_and_resolve_references(), sam=None, mask_scope=None)
    plain.options.clip_norm = 0.0
    self._plain = _Gradients(self._loop, plain, _ONE)
    self._batches = Paired(
      *(
        _Batches(self._loop.feed, dataclasses.replace(plain.plan, streams=Paired(stream, None)), plain)
        for stream in plain.plan.streams
      )
    )
    self._pairs = _Batches(self._loop.feed, plain.plan, plain)
    self._captured: dict[Any, _Gradients] = {}
    self._appliers: dict[Any, Any] = {}

  def pair(self, number: int) -> Pair:
    """Computes the gradients and losses of a step's batch pair at the original model.

    Args:
      number: number of the step, from 0.

    Returns:
      The pair.

    Raises:
      UserError: if a gradient is not finite.
    """
    found = [
      self._watch.run(functools.partial(self._plain, self._variables, self._frozen, of, number))
      for of in self._batches
    ]
    gradients, losses = (Paired(*(one.retain for one in both)) for both in zip(*found, strict=True))
    pair = Pair(number, gradients, gradients, losses)
    return pair._replace(seen=self._seen(_BOTH, pair))

  def takes(self, name: str) -> bool:
    """Whether the step of a method can be computed here.

    With sharpness-aware gradients, a method of one role would be perturbed to another point than the pair.
    """
    both = len(methods.METHODS[name].roles) == 2
    return can_step(name) and (both or self._stage.sam is None)

  def step(self, name: str, pair: Pair) -> Step:
    """Computes the step of a method with a batch pair, by its own transform and the configured optimizer.

    Args:
      name: name of a method for which `takes` is True.
      pair: a pair of this preview.

    Returns:
      The step.
    """
    (substep,) = methods.METHODS[name].substeps
    seen = self._seen(substep, pair)
    if name not in self._appliers:
      self._appliers[name] = self._applier(substep)
    update, stop = self._watch.run(
      lambda: jax.device_get(self._appliers[name](seen, self._variables["params"], self._frozen.mask))
    )
    norms = Paired(*(None if gradient is None else float(optax.tree.norm(gradient)) for gradient in seen))
    return Step(update, Stop(int(stop)), norms)

  def losses(self, pair: Pair, update: Tree | None = None) -> Paired:
    """The losses of a batch pair at the original model, or after an update."""
    variables = self._variables
    if update is not None:
      variables = variables | {"params": optax.apply_updates(variables["params"], update)}
    return Paired(
      *(
        self._watch.run(
          functools.partial(self._plain.losses, variables, self._frozen, of, pair.number)
        ).retain
        for of in self._batches
      )
    )

  def _seen(self, substep: methods.SubStep, pair: Pair) -> Paired:
    """The gradients that are passed to a sub-step's transform."""
    stage = self._stage
    is_plain = all(set(role or ()) <= {"ce"} for role in (substep.retain, substep.forget))
    if is_plain and stage.sam is None:
      return self._scaled(substep, pair.gradients)
    roles = tuple(role and tuple(sorted(role.items())) for role in (substep.retain, substep.forget))
    key = (roles, substep.one_loss)
    if key not in self._captured:
      if stage.sam is not None and stage.sam.scope == "step" and not substep.one_loss:
        # Without a joint loss, there is no joint gradient for the perturbation.
        sam = stage.sam.copy_and_resolve_references()
        sam.scope = "auto"
        stage = stage._replace(sam=sam)
      self._captured[key] = _Gradients(self._loop, stage, substep)
    gradients, _ = self._watch.run(
      lambda: self._captured[key](self._variables, self._frozen, self._pairs, pair.number)
    )
    return gradients

  def _scaled(self, substep: methods.SubStep, gradients: Paired) -> Paired:
    """Scales, masks and clips the plain losses' gradients as the step does."""
    hyperparameters = hyperparameters_of(self._stage.options, methods.Method((substep,)))

    def one(gradient, coefficients):
      if coefficients is None:
        return None
      seen = jax.tree.map(lambda leaf: coefficients["ce"] * leaf, gradient)
      if self._stage.mask_scope is not None:
        seen = sam_jax.apply_mask(seen, self._frozen.mask)
      return sub_step.clip(seen, optax.tree.norm(seen), hyperparameters["clip_norm"])

    return Paired(*map(one, gradients, substep.coefficients(hyperparameters, 0)))

  def _applier(self, substep: methods.SubStep):
    """Returns (gradients, params, mask) -> (update, `Stop` code)."""
    stage, method = self._stage, methods.Method((substep,))
    program = self._loop.program(stage._replace(method=method), None)
    (optimizer,) = program.optimizers(hyperparameters_of(stage.options, method))

    @jax.jit
    def apply(seen, params, mask):
      updates, state = optimizer.update(seen.retain, optimizer.init(params), params, forget_grads=seen.forget)
      if stage.mask_scope == "update":
        updates = sam_jax.apply_mask(updates, mask)
      return updates, getattr(state[0], "stop", jnp.asarray(Stop.NONE, jnp.int32))

    return apply


class _Batches:
  """The batches of a plan; the last requested batch is cached.

  Args:
    feed: a `feed.ResidentImages`, or another feed.
    plan: plan of a stage, or of one of its roles.
    stage: stage whose steps read the batches.
  """

  def __init__(self, feed, plan, stage: stage_lib.Stage):
    self._feed, self._plan = feed, plan
    feed.prepare(plan, max(stage.total_steps, stage.plan.steps_per_epoch))
    self._last: tuple[Any, Any] = None, None

  def at(self, number: int, mesh):
    """The data and the batches of a step."""
    if self._last[0] != (number, mesh):
      self._last = (number, mesh), self._feed.chunk(self._plan, number, number + 1, mesh)
    return self._last[1]


class _Gradients:
  """The losses of a sub-step and the gradients that are passed to its transform, by the loop's own step.

  Args:
    loop: loop of the experiment.
    stage: stage of the experiment; its method is replaced by the sub-step.
    substep: sub-step; its transform is ignored.
  """

  def __init__(self, loop: loop_lib.Loop, stage: stage_lib.Stage, substep: methods.SubStep):
    substep = substep._replace(transform=methods.Transform(lambda *arguments: capture()))
    self._loop, self._stage = loop, stage._replace(method=methods.Method((substep,)))
    self._mesh = stage_lib.stage_mesh(self._stage, loop.pairing, loop.devices, loop.weights)
    self._hyperparameters = hyperparameters_of(stage.options, self._stage.method, stage.sam)
    self._program = loop.program(self._stage, self._mesh)

    def step(state, frozen, data, batches, count, hyperparameters):
      del count
      batches = jax.tree.map(lambda leaf: leaf[0], batches)
      state, metrics = self._program.step(state, frozen, data, batches, hyperparameters)
      return state, Paired(*(metrics.get(f"{role}_loss") for role in Paired._fields))

    def gradients(*arguments):
      state, losses = step(*arguments)
      return state.opt_state[0][0].gradients, losses, state.stop

    self._compute = self._compile(gradients)
    # The compiler removes the computations that only the gradients need.
    self._evaluate = self._compile(lambda *arguments: step(*arguments)[1])

  def __call__(
    self, variables: Tree, frozen: sub_step.Frozen, batches: _Batches, number: int
  ) -> tuple[Paired, Paired]:
    """Returns the gradients and losses of a step on the host; None for a role without them."""
    found = self._compute(*self._arguments(variables, frozen, batches, number))
    gradients, losses, stop = jax.device_get(found)
    if stop != Stop.NONE:
      raise UserError(
        f"a loss or gradient of the original model is not finite on batch pair {number}; train it again "
        "with a lower config.train.optimizer.learning_rate"
      )
    return gradients, jax.tree.map(float, losses)

  def losses(self, variables: Tree, frozen: sub_step.Frozen, batches: _Batches, number: int) -> Paired:
    """The losses alone, without their gradients."""
    losses = self._evaluate(*self._arguments(variables, frozen, batches, number))
    return jax.tree.map(float, jax.device_get(losses))

  def _compile(self, function):
    return chunk_lib.compile_target(
      function,
      self._mesh,
      self._stage.method.roles,
      sharded_data=self._loop.feed.sharded,
      base_specs=loop_lib.specs(self._loop.base(self._mesh)),
    )

  def _arguments(self, variables, frozen, batches, number):
    state = create_state(variables, self._program.optimizers(self._hyperparameters), self._stage.seed)
    # With the number of the step, it makes the same random draws as in the run.
    state = state.replace(step=jnp.int32(number))
    state, frozen = place((state, frozen._replace(base=None)), self._mesh)
    data, batches = batches.at(number, self._mesh)
    frozen = frozen._replace(base=self._loop.base(self._mesh))
    return state, frozen, data, batches, jnp.int32(1), self._hyperparameters
