"""What a plan says of small programs of known size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hamu_jax import hlo, plan
from hamu_jax.errors import UserError


@pytest.fixture
def target(monkeypatch):
  """Simulated devices, whether libtpu is here or not."""
  monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
  return plan.find_target("v5e:2x2")


def test_analyse(target):
  mesh = jax.sharding.Mesh(np.asarray(target.devices), ("d",))
  split = jax.ShapeDtypeStruct((4096, 64), jnp.float32, sharding=NamedSharding(mesh, P("d")))
  kept = jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=NamedSharding(mesh, P()))

  def program(x, y):
    return y + 1, jax.lax.psum(jnp.sum(x), "d")

  jitted = jax.jit(
      jax.shard_map(program, mesh=mesh, in_specs=(P("d"), P()), out_specs=P()), donate_argnums=1)
  found = plan.analyse(jitted.lower(split, kept), target)
  # A quarter of the first argument, the second one, and two scalars and pointers of outputs.
  assert found.arguments == 4096 * 64 * 4 // 4 + 4000
  assert 0 < found.outputs < 100
  assert found.hbm == found.arguments + found.outputs + found.temporaries + found.code
  assert [one.size for one in found.cost.collectives.values()] == [4]


def test_description(target):
  cost = hlo.Cost(3 * 10**9, {
      "a": hlo.Collective("all-gather", 2**28, 6, True),
      "b": hlo.Collective("all-gather", 2**27, 4, True),
      "c": hlo.Collective("all-reduce", 2**20),
  }, 0)
  gib = 2**30
  text = plan.describe(plan.Plan(3 * gib, gib // 4, gib // 2, gib // 4, cost), target)
  assert text.splitlines() == [
      "4 devices of v5e:2x2, an estimate, from simulated CPU devices",
      "arguments              3 GiB",
      "outputs in new places  0.25 GiB",
      "temporaries            0.5 GiB",
      "program                0.25 GiB",
      "memory of a device     4 GiB of 16 GiB, 25%",
      "fits                   yes",
      "computing              2 s a step, the compiler's estimate",
      "exchanging             0.0239 s a step at the links' rate, partly at the same time",
      "all-gather             10 a step, in loops, 2 GiB",
      "all-reduce             1 a step, 1 MiB",
  ]
  text = plan.describe(plan.Plan(17 * gib, 0, 0, 0, hlo.Cost(0, {}, 0)), target)
  assert "106%\nfits                   no" in text
  assert "computing" not in text


def test_table():
  assert plan.format_table(("name", "s"), [("a", 1), ("longer", 22.5)]).splitlines() == [
      "name       s", "a          1", "longer  22.5"]


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:8", "v5e:2x4 "])
def test_topologies_that_are_none(topology):
  with pytest.raises(UserError, match=rf"--topology={topology}: .*v4, v5e, v5p, v6e.*v5e:2x4"):
    plan.find_target(topology)


def test_more_devices_than_jax_started_with(target):
  with pytest.raises(UserError, match="64 devices cannot be simulated with 4; pip install"):
    plan.find_target("v5e:8x8")


class _Lowered:
  """A program that the compiler refuses."""

  def __init__(self, message):
    self._message = message

  def compile(self):
    raise jax.errors.JaxRuntimeError(self._message)


def test_what_does_not_fit(target):
  refused = _Lowered(
      "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
      "required for HLO temporaries (20.30G) exceeds available HBM (15.75G). HLO module: jit_step.\n"
      "See https://openxla.org/xla/errors/error_1000 for more details.")
  with pytest.raises(UserError, match=r"v5e:2x2: .*\(20.30G\) exceeds available HBM \(15.75G\); tak"):
    plan.analyse(refused, target)
  with pytest.raises(jax.errors.JaxRuntimeError, match="another reason"):
    plan.analyse(_Lowered("another reason"), target)
