"""Costs read from HLO, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from hamu_jax.planning import hlo

# As libtpu writes them: no trip counts, and a gather in pieces beside other work.
TPU = """HloModule jit_step, is_scheduled=true

%add.1 (lhs: f32[], rhs: f32[]) -> f32[] {
  %lhs = f32[]{:T(128)} parameter(0)
  %rhs = f32[]{:T(128)} parameter(1)
  ROOT %add.2 = f32[]{:T(128)} add(%lhs, %rhs)
}

%async_collective_fusion.1 (p.0: bf16[1,8,64], p.1: bf16[4,64]) -> (bf16[4,64], bf16[1,32,64]) {
  %p.0 = bf16[1,8,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.2 = bf16[1,32,64]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p.0), channel_id=2, \
replica_groups={{0,1,2,3}}, dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %tuple.1 = (bf16[4,64]{1,0}, bf16[1,32,64]{2,1,0}) tuple(%p.1, %all-gather.2)
}

%body.1 (param.1: (s32[], bf16[6,8,64])) -> (s32[], bf16[6,8,64]) {
  %all-gather.1 = bf16[1,32,64]{2,1,0:T(8,128)(2,1)} all-gather(%x), channel_id=2, \
replica_groups={{0,1,2,3}}, dimensions={1}, frontend_attributes={chain_id="0"}
  %fusion.1 = (bf16[4,64]{1,0:T(8,128)(2,1)}, /*index=1*/bf16[1,32,64]{2,1,0}) \
fusion(%x, %y), kind=kOutput, calls=%async_collective_fusion.1, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %tuple.2 = (s32[], bf16[6,8,64]{2,1,0}) tuple(%i, %w)
}

%condition.1 (param.2: (s32[], bf16[6,8,64])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(6), metadata={op_name="jit(step)/while"}
  %param.2 = (s32[]{:T(128)}, bf16[6,8,64]{2,1,0}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%param.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.5), direction=LT
}

ENTRY %main.1 (a: f32[5], b: bf16[6,8,64]) -> f32[5] {
  %while.1 = (s32[]{:T(128)}, bf16[6,8,64]{2,1,0}) while(%tuple.3), condition=%condition.1, \
body=%body.1, metadata={op_name="jit(step)/while"}
  %fusion.2 = f32[5]{0:T(128)} fusion(%a), kind=kLoop, calls=%add.1, \
backend_config={"estimated_cycles":"7"}
  %all-reduce.1 = f32[5]{0:T(1024)S(1)} all-reduce(%fusion.2), channel_id=1, to_apply=%add.1
  %permute.1 = (f32[5]{0:T(1024)}, f32[5]{0:T(1024)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%all-reduce.1), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %done.1 = f32[5]{0:T(1024)} collective-permute-done(%permute.1)
}
"""


def test_loops_count_as_often_as_they_run():
  cost = hlo.read(TPU)
  assert cost.cycles == 6 * 100 + 7
  assert cost.open_loops == 0
  assert sorted(cost.collectives.values()) == [
    hlo.Collective("all-gather", 32 * 64 * 2, 6, True),
    hlo.Collective("all-reduce", 20, 1, False),
    hlo.Collective("collective-permute", 20, 1, False),
  ]
  assert cost.moved == 6 * 4096 + 20 + 20


def test_cycles_that_the_compiler_does_not_know():
  assert hlo.read(TPU.replace('cycles":"7"', f'cycles":"{2**63 - 1}"')).cycles == 6 * 100


def test_a_loop_that_ends_on_data_counts_once():
  open_text = TPU.replace("compare(%get-tuple-element.1, %constant.5)", "compare(%n, %limit)")
  cost = hlo.read(open_text)
  assert cost.open_loops == 1
  assert cost.cycles == 107
  assert hlo.read(open_text, (6,)) == hlo.read(TPU)


def _compile(program):
  """The executable of `program` (x, count) on all devices, which are its axis "d"."""
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("d",))
  mapped = jax.shard_map(program, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
  return jax.jit(mapped).lower(jnp.float32(1), jnp.int32(2)).compile()


@pytest.fixture(scope="module")
def compiled():
  """A program with known collectives, compiled here."""

  def inner(carry, w):
    whole = lax.all_gather(w, "d", tiled=True)  # 3 x 5 times 16 float32 of bfloat16's half
    return carry + jnp.sum(whole), None

  def outer(carry, _):
    carry, _ = lax.scan(inner, carry, carry[None, None] * jnp.ones((5, 4)))
    return carry, None

  def program(x, count):
    def body(pair):
      index, carry = pair
      carry, _ = lax.scan(outer, carry, None, length=3)
      big = lax.cond(
        lax.axis_index("d") == 0, lambda: lax.psum(carry * jnp.ones(11), "d")[0], lambda: lax.psum(carry, "d")
      )
      return index + 1, big

    _, y = lax.while_loop(lambda pair: pair[0] < count, body, (jnp.int32(0), x))
    return lax.ppermute(y, "d", [(0, 1), (1, 0)])

  return _compile(program)


def test_this_machines_compiler(compiled):
  cost = hlo.read(compiled.as_text())
  assert sorted(cost.collectives.values()) == [
    hlo.Collective("all-gather", 16 * 4, 15, True),
    # Of the two branches the dearer.
    hlo.Collective("all-reduce", 11 * 4, 1, True),
    hlo.Collective("collective-permute", 4, 1, False),
  ]
  assert cost.open_loops == 1


def test_loops_that_end_on_data_count_as_often_as_they_are_said_to():
  def program(x, count):
    def inner(index, y):
      return lax.psum(y, "d") * index

    def outer(index, y):
      return lax.fori_loop(0, 7, inner, lax.fori_loop(0, count + index, inner, y))

    return lax.fori_loop(0, count, outer, x)

  text = _compile(program).as_text()

  def times(trips):
    cost = hlo.read(text, trips)
    return sorted(one.times for one in cost.collectives.values()), cost.open_loops

  assert times(()) == ([1, 7], 2)
  assert times((2,)) == ([2, 14], 1)
  assert times((2, 5)) == ([10, 14], 0)
