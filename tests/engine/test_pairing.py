"""The three pairings compute the same step, and `pmap` exchanges the gradients once."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hamu_jax.config import default as config_lib
from hamu_jax.config.fields.run import PAIRINGS
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import methods, pairing, placement, sub_step
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.train_state import create_state
from hamu_jax.errors import UserError
from hamu_jax.models.resnet import ConvNorm
from hamu_jax.paired import Paired
from hamu_jax.vision import feed
from hamu_jax.vision.task import make_fetch, make_forward

CLASSES = 4
# Short batches: 11 of 12 and 7 of 10 valid examples, which no number of devices divides.
ROWS = Paired(
  retain=np.array([[*range(11), -1], [*range(12, 24)]], np.int32),
  forget=np.array([[*range(30, 37), *[-1] * 3], [*range(37, 47)]], np.int32),
)


class Net(nn.Module):
  """One convolution with batch norm and a classifier: little to compile."""

  @nn.compact
  def __call__(self, x_BxHxWxC, *, train=False, mask=None, axis_name=None):
    x = ConvNorm(4, "cpu", stride=2)(x_BxHxWxC, train=train, mask=mask, axis_name=axis_name)
    return nn.Dense(CLASSES)(nn.relu(x).reshape(len(x), -1))


@pytest.fixture(scope="module")
def problem():
  rng = np.random.default_rng(3)
  data = feed.ImageData(
    rng.integers(0, 256, (50, 8, 8, 1)).astype(np.uint8),
    rng.integers(0, CLASSES, 50).astype(np.int32),
    np.arange(50) >= 30,
    np.arange(50, dtype=np.int32),
  )
  model = Net()
  variables = model.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)), train=False)
  reference = model.init(jax.random.key(2), jnp.zeros((1, 8, 8, 1)), train=False)
  return model, data, variables, reference


def prepare(problem, name, kind, devices, *, microbatch=0, train=False, augment="none"):
  """-> jitted chunk and its arguments."""
  model, data, variables, reference = problem
  options = config_lib.default_config().method
  options.name = name
  options.on_infeasible = "project"
  options.optimizer.learning_rate = 0.1
  options.constraint_ratio = 0.05
  method = methods.METHODS[name]
  mesh = None
  if kind == "pmap":
    mesh = pairing.make_mesh(jax.devices()[:devices], method.device_groups)
  axis = pairing.DATA_AXIS if kind == "pmap" else None
  program = step_lib.make_step(
    method,
    options,
    forward=make_forward(model, (0.5,), (0.5,), axis),
    fetch=make_fetch(augment),
    pairing=kind,
    train=train,
    schedule=optax.constant_schedule(1.0),
    microbatch=microbatch,
  )
  hyperparameters = hyperparameters_of(options, method)
  state = create_state(variables, program.optimizers(hyperparameters), seed=0)
  indices = Paired(
    *(
      role_indices if role in method.roles else None
      for role, role_indices in zip(Paired._fields, ROWS, strict=True)
    )
  )
  chunk = chunk_lib.compile_target(chunk_lib.make_chunk(program.step), mesh, method.roles)
  frozen = sub_step.Frozen(reference)
  state, frozen, data = placement.place((state, frozen, data), mesh)
  if mesh is not None:
    indices = pairing.shard_indices(indices, mesh)
  batches = placement.place_batches(indices, np.zeros(2, np.int32), mesh)
  return chunk, (state, frozen, data, batches, jnp.int32(2), hyperparameters)


def run(*args, **kwargs):
  chunk, arguments = prepare(*args, **kwargs)
  state, metrics, done = chunk(*arguments)
  assert int(done) == 2
  return jax.device_get((state, metrics))


def assert_same(got, wanted):
  for (path, leaf), other in zip(
    jax.tree.leaves_with_path(got.variables), jax.tree.leaves(wanted.variables), strict=True
  ):
    np.testing.assert_allclose(leaf, other, rtol=2e-4, atol=2e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["hamu-q", "scrub"])
def test_pairings_agree_on_short_batches(problem, name):
  wanted, metrics = run(problem, name, "sequential", 1)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), wanted.params, problem[2]["params"])
  assert max(jax.tree.leaves(moved)) > 1e-4
  for kind, devices in (("vmap", 1), ("pmap", 2), ("pmap", 4)):
    state, other = run(problem, name, kind, devices)
    assert_same(state, wanted)
    for key in ("retain_loss", "forget_loss", "retain_accuracy", "forget_grad_norm"):
      np.testing.assert_allclose(other[key][:2], metrics[key][:2], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ft", "ga", "gdiff", "kl", "gru", "pcgrad", "hamu-u"])
def test_pairings_agree_for_every_method(problem, name):
  wanted, _ = run(problem, name, "sequential", 1)
  for kind, devices in (("vmap", 1), ("pmap", 4)):
    assert_same(run(problem, name, kind, devices)[0], wanted)


@pytest.mark.parametrize("kind", ["sequential", "pmap"])
def test_microbatches_change_nothing(problem, kind):
  wanted, _ = run(problem, "hamu-q", "sequential", 1)
  assert_same(run(problem, "hamu-q", kind, 2, microbatch=5)[0], wanted)


def test_batch_statistics_are_synchronised(problem):
  """Training on three devices, one of which gets fewer examples, is training on one."""
  wanted, _ = run(problem, "ft", "sequential", 1, train=True)
  got, _ = run(problem, "ft", "pmap", 3, train=True)
  changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), wanted.batch_stats, problem[2]["batch_stats"])
  assert min(jax.tree.leaves(changed)) > 1e-6
  assert_same(got, wanted)


def test_augmentation_does_not_depend_on_the_layout(problem):
  plain, _ = run(problem, "gdiff", "sequential", 1)
  wanted, _ = run(problem, "gdiff", "sequential", 1, augment="crop_flip")
  got, _ = run(problem, "gdiff", "pmap", 4, augment="crop_flip")
  assert_same(got, wanted)
  differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), plain.params, wanted.params)
  assert max(jax.tree.leaves(differences)) > 1e-5


_BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "f64": 8}
_COLLECTIVE = re.compile(
  r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?\("
)


def collective_bytes(hlo: str) -> int:
  """Output bytes of every collective in optimized HLO, scalars included."""
  total = 0
  for shapes, _, _ in _COLLECTIVE.findall(hlo):
    for kind, dimensions in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
      total += _BYTES[kind] * int(np.prod([int(d) for d in dimensions.split(",") if d]))
  return total


@pytest.mark.parametrize("devices", [2, 4])
def test_gradients_cross_between_the_halves_once(problem, devices):
  chunk, arguments = prepare(problem, "hamu-q", "pmap", devices)
  hlo = chunk.lower(*arguments).compile().as_text()
  gradient = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(problem[2]["params"]))
  # Beside the gradients travel the count, loss and accuracy, which are summed up with counts of their own.
  assert gradient <= collective_bytes(hlo) <= 2 * gradient + 7 * 4


def test_device_program_never_calls_the_host(problem):
  for kind in PAIRINGS:
    chunk, arguments = prepare(problem, "hamu-q", kind, 2)
    jaxpr = str(chunk.trace(*arguments).jaxpr)
    assert not re.search(r"callback|infeed|outfeed", jaxpr)


@pytest.mark.parametrize(
  ("devices", "roles", "shape"), [(4, 2, (2, 2, 1)), (3, 1, (1, 3, 1)), (2, 2, (2, 1, 1))]
)
def test_mesh_gives_each_role_an_equal_share(devices, roles, shape):
  assert pairing.make_mesh(jax.devices()[:devices], roles).devices.shape == shape


def test_devices_that_share_weights_are_a_group_of_a_role():
  devices = jax.devices()[:4]
  mesh = pairing.make_mesh(devices, 2, 2)
  assert mesh.devices.tolist() == [[devices[:2]], [devices[2:]]]
  with pytest.raises(UserError, match="config.mesh.weights=3: 2 devices of a role"):
    pairing.make_mesh(devices, 2, 3)


def test_odd_number_of_devices_is_refused():
  with pytest.raises(UserError, match=r"even number of devices.*got 3.*config.devices"):
    pairing.make_mesh(jax.devices()[:3], 2)


def test_rows_are_shared_out_once_and_padding_evenly():
  mesh = pairing.make_mesh(jax.devices()[:4], 2)
  shards = pairing.shard_indices(ROWS, mesh)
  assert shards.shape == (2, 2, 2, 6)
  for role, role_indices in enumerate(ROWS):
    for step in range(2):
      got = shards[step, role]
      assert sorted(got[got >= 0]) == sorted(role_indices[step][role_indices[step] >= 0])
      valid = (got >= 0).sum(axis=1)
      assert valid.max() - valid.min() <= 1
