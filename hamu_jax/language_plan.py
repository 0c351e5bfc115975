"""The device program of an experiment on a language model, from sizes alone.

It is the loop's own, but nothing is opened for it: neither weights nor a tokenizer, texts or devices.
Texts of assumed lengths stand for those of the experiment.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from hamu_jax import language, loop, methods, objectives, stage_plan
from hamu_jax import pairing as pairing_lib
from hamu_jax import step as step_lib
from hamu_jax.data import encoding, packing
from hamu_jax.models.llama_config import LlamaConfig
from hamu_jax.packed import Packed
from hamu_jax.paired import Paired
from hamu_jax.train_state import create_state

Tree = Any
# Batches a role in an epoch. The more there are, the longer the longest of them.
_BATCHES = 20
# Texts have lengths between these multiples of the mean, evenly; a quarter of each is its prompt.
SHORTEST, LONGEST = 0.5, 1.5
PROMPT = 0.25
# Tokens of an answer that a method prefers to the text's own.
_REFUSAL = 10


class Texts(language.Adapted):
  """An experiment as `language.Language` is one, with texts of which there are only lengths.

  Args:
    config: validated.
    sizes: of the model.
    example_tokens: mean length of a text, template included.
  """

  inputs: dict[str, Any] = {}
  unlearning_inputs: dict[str, Any] = {}

  def __init__(self, config: ml_collections.ConfigDict, sizes: LlamaConfig, example_tokens: int):
    super().__init__(config, sizes)
    self._example_tokens = example_tokens
    count = _BATCHES * max(config.train.batch_size, config.method.batch_size)
    rows = np.arange(2 * count, dtype=np.int32)
    self.problem = language.TextProblem("", Paired(rows[:count], rows[count:]))

  def source(self) -> Packed:
    """The texts, packed."""
    rows = self.problem.rows
    spread = np.linspace(SHORTEST, LONGEST, len(rows.retain)) * self._example_tokens
    tokens = np.tile(spread.round().astype(int).clip(2, self._config.text.max_length), 2)
    prompts = (tokens * PROMPT).astype(int).clip(1)
    alternatives = None
    if self._needs_alternatives:
      alternatives = _encoded(prompts + _REFUSAL, prompts)
    forget = np.arange(len(tokens)) >= len(rows.retain)
    return Packed(
        packing.TextData(_encoded(tokens, prompts), alternatives, forget),
        self._config.text.row_length, max(self.microbatch(True), 1),
    )


def _encoded(tokens, prompts) -> encoding.Encoded:
  return encoding.Encoded(tuple(np.ones(count, np.int32) for count in tokens), prompts, 0)


class Outline:
  """The last stage of an experiment, ready to be compiled.

  Attributes:
    stage: as the loop runs it.
    devices: those that work on a step.
    shape: of its packed batches.
    share: rows of a role's batch on a device, at most.
    trips: how often the loops run whose length is data, see `hlo.read`: one step, and its pieces.

  Args:
    config: validated.
    sizes: of the model.
    devices: to choose from; they need not be there.
    example_tokens: see `Texts`.

  Raises:
    UserError: the experiment cannot run on these devices, or not with such texts.
  """

  def __init__(
      self, config: ml_collections.ConfigDict, sizes: LlamaConfig, devices: Sequence[Any],
      example_tokens: int,
  ):
    config = config.copy_and_resolve_references()
    # Trained weights have the shapes of new ones.
    config.model.weights = ""
    self._config = config
    self._task = Texts(config, sizes, example_tokens)
    self.devices = pairing_lib.choose_devices(devices, config.pairing, config.devices)
    plan = stage_plan.make_plan(
        config, self._task, self._task.problem.rows, devices=len(self.devices)
    )
    self.stage = plan.stages[plan.final]
    self._mesh = loop.stage_mesh(self.stage, config.pairing, self.devices, config.mesh.weights)
    self._together = loop.shared_axes(self._mesh)
    self._source = self._task.source()
    self._source.prepare(self.stage.plan, self.stage.total_steps)
    self.shape = self._source.shape(self.stage.plan)
    self.share = jax.tree.leaves(self._rows())[0].shape[-1]
    pieces = -(-self.share // self.stage.microbatch) if self.stage.microbatch else 1
    self.trips = (1, pieces)

  @property
  def parameters(self) -> tuple[int, int]:
    """How many the frozen model has, and how many are trained."""
    trees = self._task.abstract_base(None), self._task.template["params"]
    return tuple(sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in trees)

  def step(self) -> jax.stages.Lowered:
    """A chunk of steps, as the loop runs them."""
    return self._lower(self._program.step)

  def plain(self) -> jax.stages.Lowered:
    """In its place the gradients of each role's loss alone: no transform and no optimizer."""
    role = objectives.role_gradient(
        self._task.forward(self._config.pairing), language.fetch, ("ce",),
        train=self.stage.training_mode, microbatch=self.stage.microbatch, together=self._together,
    )
    # Where each half of the devices has a role, its rows have both names.
    roles = self.stage.method.roles[: 1 if self.stage.method.device_groups == 2 and self._mesh else 2]

    def step(state, frozen, data, feed, settings):
      key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
      inputs = objectives.Inputs(frozen.base, None, data, key, key, settings)
      gradients = [
          role(state.variables, inputs, getattr(feed.rows, name), {"ce": jnp.float32(1)}).gradient
          for name in roles
      ]
      if self._mesh:
        gradients = jax.lax.psum(gradients, pairing_lib.SHARE_AXES)
      # They have to go somewhere, or the compiler leaves them out.
      total = jax.tree.map(lambda *leaves: sum(leaves), *gradients)
      return state.replace(params=total, step=state.step + 1), {}

    return self._lower(step)

  @functools.cached_property
  def _program(self) -> step_lib.StepProgram:
    pairing = self._config.pairing
    return loop.stage_program(
        self.stage, forward=self._task.forward(pairing), fetch=language.fetch, pairing=pairing,
        together=self._together,
    )

  def _lower(self, step) -> jax.stages.Lowered:
    stage, base = self.stage, self._task.abstract_base(self._mesh)
    settings = step_lib.settings_of(stage.options, stage.sam)
    state = jax.eval_shape(
        lambda variables: create_state(variables, self._program.optimizers(settings), stage.seed),
        self._task.template,
    )
    reference = None
    if methods.needs_reference(stage.method, objectives.TERMS):
      reference = self._task.template
    specs = {}
    if self._mesh is not None:
      specs = jax.tree.map(lambda leaf: leaf.sharding.spec, base)
    else:
      base = self._placed(base)
    chunk = step_lib.compile_target(
        step_lib.make_chunk(step), self._mesh, stage.method.roles, base_specs={"base": specs}
    )
    roles = sum(role is not None for role in stage.plan.streams)
    window = self.shape.empty(self._source.most_steps(stage.plan) * roles * self.shape.rows)
    return chunk.lower(
        self._placed(state),
        step_lib.Frozen(self._placed(reference), None, {"base": base}),
        self._placed(window),
        self._feed(),
        self._placed(jax.ShapeDtypeStruct((), jnp.int32)),
        settings,
    )

  def _rows(self):
    """The rows of a chunk's feed."""
    streams = self.stage.plan.streams
    empty = np.zeros((step_lib.CHUNK_CAPACITY, self.shape.rows), np.int32)
    rows = Paired(*(None if role is None else empty for role in streams))
    return rows if self._mesh is None else pairing_lib.shard_rows(rows, self._mesh)

  def _feed(self) -> step_lib.Feed:
    epoch = jax.ShapeDtypeStruct((step_lib.CHUNK_CAPACITY,), jnp.int32)
    spec = jax.sharding.PartitionSpec(None, pairing_lib.ROLE_AXIS, pairing_lib.SHARE_AXES)
    return step_lib.Feed(self._placed(self._rows(), spec), self._placed(epoch))

  def _placed(self, tree: Tree, spec=jax.sharding.PartitionSpec()) -> Tree:
    """Shapes on the device, or on the mesh as `spec` has them."""
    if self._mesh is None:
      sharding = jax.sharding.SingleDeviceSharding(self.devices[0])
    else:
      sharding = jax.sharding.NamedSharding(self._mesh, spec)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
