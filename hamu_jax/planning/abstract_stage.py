"""The device program of a stage of an experiment, from shapes alone.

The program is that of the loop, but neither data nor weights nor devices are opened. `planning.language` and
`planning.vision` add what depends on the modality.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import loop, methods, objectives, sub_step
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine import role_gradient as role_gradient_lib
from hamu_jax.engine import stage as stage_lib
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.train_state import create_state
from hamu_jax.experiment import stage_plan
from hamu_jax.paired import Paired

Tree = Any
# The stages of the original and of the unlearned model.
STAGES = ("pretrain", "unlearn")


class AbstractStage:
  """A stage, ready to be compiled.

  Attributes:
    stage: stage of the loop.
    devices: devices that work on a step.

  Args:
    config: validated configuration.
    task: task of the experiment; shapes suffice.
    split: Paired indices of the retain and forget examples.
    devices: devices to choose from; they need not exist.
    stage: one of `STAGES`. For a method that trains from scratch, "unlearn" is its training.

  Raises:
    UserError: the experiment cannot run on these devices.
  """

  # Plural noun for the examples, such as "images".
  examples: str

  def __init__(
    self, config: ml_collections.ConfigDict, task: Any, split: Paired, devices: Sequence[Any], stage: str
  ):
    config = config.copy_and_resolve_references()
    # Imported weights have the same shapes as new ones, so they are not opened.
    config.model.weights = config.retrained = ""
    self._config, self._task = config, task
    self.devices = pairing_lib.choose_devices(devices, config.pairing, config.devices)
    plan = stage_plan.make_plan(config, task, split, devices=len(self.devices))
    # All stages of an experiment must be able to use the devices.
    meshes = {
      name: stage_lib.stage_mesh(one, config.pairing, self.devices, config.mesh.weights)
      for name, one in plan.stages.items()
    }
    chosen = plan.final if stage == "unlearn" else stage
    self.stage, self._mesh = plan.stages[chosen], meshes[chosen]
    self._exchange_axes = stage_lib.shared_axes(self._mesh)

  @property
  def examples_per_batch(self) -> int:
    """The number of examples of a role's batch."""
    raise NotImplementedError

  @property
  def parameters(self) -> tuple[int, int]:
    """The numbers of parameters that no stage trains and that are trained."""
    trees = self._base(), self._task.template["params"]
    return tuple(sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in trees)

  @property
  def share(self) -> int:
    """The largest number of examples of a role's batch on a device."""
    return jax.tree.leaves(self._indices())[0].shape[-1]

  @property
  def trips(self) -> tuple[int, int]:
    """The numbers of iterations of loops whose length is data, see `hlo.read`: one step, and its pieces."""
    return 1, -(-self.share // self.stage.microbatch) if self.stage.microbatch else 1

  def facts(self) -> list[tuple[str, str]]:
    """What is compiled and assumed, as pairs of name and text."""
    what = self.stage.name if self.stage.train else self._config.method.name
    each = " a role" if len(self.stage.method.roles) > 1 else ""
    return [("step", f"{what}, {self._config.pairing}, {self.stage.plan.batch_size} {self.examples}{each}")]

  def step(self) -> jax.stages.Lowered:
    """Lowers a chunk of steps of the loop."""
    return self._lower(self._program.step)

  def plain(self) -> jax.stages.Lowered:
    """Lowers a chunk of gradients of each role's loss, without transform and optimizer."""
    role = role_gradient_lib.role_gradient(
      self._task.forward(self._config.pairing),
      self._fetch,
      ("ce",),
      train=self.stage.training_mode,
      microbatch=self.stage.microbatch,
      exchange_axes=self._exchange_axes,
    )
    # If each half of the devices has a role, its indices have the names of both roles.
    roles = self.stage.method.roles[: 1 if self.stage.method.device_groups == 2 and self._mesh else 2]

    def step(state, frozen, data, batches, hyperparameters):
      key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
      inputs = role_gradient_lib.Inputs(frozen.base, None, data, key, key, hyperparameters)
      gradients = [
        role(state.variables, inputs, getattr(batches.indices, name), {"ce": jnp.float32(1)}).gradient
        for name in roles
      ]
      if self._mesh:
        gradients = jax.lax.psum(gradients, pairing_lib.SHARE_AXES)
      # The gradients must be part of the result, or the compiler removes them.
      total = jax.tree.map(lambda *leaves: sum(leaves), *gradients)
      return state.replace(params=total, step=state.step + 1), {}

    return self._lower(step)

  def _base(self) -> Tree:
    """Shapes of the variables that no stage trains, placed."""
    return {}

  def _data(self) -> Tree:
    """Shapes of what the steps of a chunk gather from, placed."""
    raise NotImplementedError

  @property
  def _sharded_data(self) -> bool:
    """See `chunk.compile_target`."""
    return False

  @property
  def _fetch(self):
    return self._task.fetch(self.stage.options.augment)

  @functools.cached_property
  def _program(self) -> step_lib.StepProgram:
    pairing = self._config.pairing
    return stage_lib.stage_program(
      self.stage,
      forward=self._task.forward(pairing),
      fetch=self._fetch,
      pairing=pairing,
      exchange_axes=self._exchange_axes,
    )

  def _lower(self, step) -> jax.stages.Lowered:
    stage, base, template = self.stage, self._base(), self._task.template
    hyperparameters = stage.hyperparameters
    state = jax.eval_shape(
      lambda variables: create_state(variables, self._program.optimizers(hyperparameters), stage.seed),
      template,
    )
    reference, mask = None, None
    if methods.needs_reference(stage.method, objectives.TERMS):
      reference = template
    if stage.mask_scope:
      mask = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.int8), template["params"])
    chunk = chunk_lib.compile_target(
      chunk_lib.make_chunk(step),
      self._mesh,
      stage.method.roles,
      sharded_data=self._sharded_data,
      base_specs=loop.specs(base),
    )
    return chunk.lower(
      self._placed(state),
      sub_step.Frozen(self._placed(reference), self._placed(mask), base),
      self._data(),
      self._batches(),
      self._placed(jax.ShapeDtypeStruct((), jnp.int32)),
      hyperparameters,
    )

  @property
  def _roles(self) -> int:
    """The number of roles that have batches."""
    return sum(role is not None for role in self.stage.plan.streams)

  def _indices(self):
    """Indices of a chunk's batches, all 0."""
    empty = np.zeros((chunk_lib.CHUNK_CAPACITY, self.examples_per_batch), np.int32)
    indices = Paired(*(None if role is None else empty for role in self.stage.plan.streams))
    return indices if self._mesh is None else pairing_lib.shard_indices(indices, self._mesh)

  def _batches(self) -> step_lib.Batches:
    epoch = jax.ShapeDtypeStruct((chunk_lib.CHUNK_CAPACITY,), jnp.int32)
    spec = jax.sharding.PartitionSpec(None, pairing_lib.ROLE_AXIS, pairing_lib.SHARE_AXES)
    return step_lib.Batches(self._placed(self._indices(), spec), self._placed(epoch))

  def _placed(self, tree: Tree, spec=jax.sharding.PartitionSpec()) -> Tree:
    """Shapes on the device, or on the mesh as `spec` has them."""
    if self._mesh is None:
      sharding: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(self.devices[0])
    else:
      sharding = jax.sharding.NamedSharding(self._mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
