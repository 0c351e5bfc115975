"""Timing on a clock of its own: what compiles does not count as a step, and shares are equal."""

import jax
import jax.numpy as jnp
import pytest

from hamu_jax.engine.timing import Timing, host_memory_bytes


class _Clock:
  """Seconds that pass, and of these those that something compiles."""

  def __init__(self):
    self.now = self.compiled = 0.0

  def passes(self, seconds, compiling=0.0):
    self.now += seconds
    self.compiled += compiling


def _timing(clock, members=1):
  return Timing(members, clock=lambda: clock.now, compiling=lambda: clock.compiled)


@pytest.mark.parametrize("members", [1, 4])
def test_steady_steps_are_those_without_compiling(members):
  clock = _Clock()
  clock.passes(100, compiling=50)  # before the stage
  timing = _timing(clock, members)
  with timing.evaluation():
    clock.passes(9, compiling=6)
  with timing.chunk(1):
    clock.passes(30, compiling=28)
  for steps, seconds in ((2, 4.0), (6, 24.0)):
    clock.passes(5)  # a checkpoint, between chunks
    with timing.chunk(steps):
      clock.passes(seconds)
  with timing.evaluation():
    clock.passes(3)
  found = timing.values([])
  assert found["compile_seconds"] == pytest.approx(34 / members)
  assert found["evaluate_seconds"] == pytest.approx(6 / members)
  # Two steps of 2 s and six of 4 s.
  assert found["steady_steps"] == 8 and found["step_seconds"] == pytest.approx(3.5 / members)
  assert found["step_seconds_deviation"] == pytest.approx(0.75**0.5 / members)


def test_without_steady_steps():
  clock = _Clock()
  timing = _timing(clock)
  with timing.chunk(2):
    clock.passes(3, compiling=1)
  found = timing.values([])
  assert (found["step_seconds"], found["steady_steps"]) == (None, 0)


def test_what_jax_compiles_is_noticed():
  timing = Timing(1)
  function = jax.jit(lambda x: jnp.sin(x) * 3 + jnp.cos(x))
  for _ in range(3):
    with timing.chunk(1):
      function(jnp.ones(7)).block_until_ready()
  found = timing.values(jax.devices())
  assert found["steady_steps"] == 2 and 0 < found["compile_seconds"] < 60
  assert found["step_seconds"] < found["compile_seconds"]
  assert 2**20 < found["host_memory_bytes"] == host_memory_bytes()
