"""Shared fixtures. Sets the number of virtual CPU devices before JAX starts."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
).strip()
# No test may reach a hub: a lookup that would need the network fails at once instead of hanging.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import jax
import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def x64():
  """Runs one test in float64."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def golden():
  """The folder of reference numbers."""
  return GOLDEN


@pytest.fixture(autouse=True)
def _strict_ranks():
  """Implicit rank promotion hides shape errors, so in tests it is one."""
  with jax.numpy_rank_promotion("raise"):
    yield
