"""Shared fixtures. Sets the number of virtual CPU devices before JAX starts."""

import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=4",
    # The tests spend their time compiling tiny programs, not running them.
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
  ]
).strip()
# No test may reach a hub: a lookup that would need the network fails at once instead of hanging.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.models import llama, llama_config, llama_weights, lora, lora_weights
from tests.arguments import replaced

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


def pytest_configure(config):
  """Lets workers, and the programs that tests start, compile each program once."""
  if not hasattr(config, "workerinput"):
    folder = tempfile.TemporaryDirectory(prefix="compiled-")
    config.add_cleanup(folder.cleanup)
    os.environ.update(JAX_COMPILATION_CACHE_DIR=folder.name, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
  jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


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


class GoldenLlama(NamedTuple):
  """A tiny Llama of `golden/llama`, its adapter, and what transformers and PEFT compute with them."""

  folder: Any
  config: llama_config.LlamaConfig
  model: llama.Llama
  params: Any
  lora: lora.LoraConfig
  adapter: Any
  expected: dict

  @property
  def tokens(self):
    return jnp.asarray(self.expected["input_ids"])

  @property
  def mask(self):
    return jnp.asarray(self.expected["attention_mask"])

  @property
  def variables(self):
    return {"params": self.params, "lora": self.adapter}


@pytest.fixture(scope="session")
def read_llama():
  """-> function: the golden model of a shape."""

  def read(shape, root):
    folder = root / "llama" / shape
    config = llama_config.read_config(folder)
    model = llama.Llama(config)
    like = llama.abstract_params(model)
    params = llama_weights.load_folder(folder, like, config)
    spec, adapter = lora_weights.load_adapter(folder / "adapter", like)
    with np.load(folder / "expected.npz") as arrays:
      expected = dict(arrays)
    return GoldenLlama(folder, config, model, params, spec, adapter, expected)

  return read


# The whole experiment in seconds: a multilayer perceptron on the digits.
SMALL = [
  "hamu_jax.main",
  "--config=configs/digits_hamu.py",
  "--config.model.name=mlp",
  "--config.train.epochs=3",
  "--config.train.evaluate_epochs=1",
  "--config.method.epochs=2",
  "--config.method.batch_size=64",
  "--config.method.evaluate_epochs=1",
  "--config.method.on_infeasible=project",
  "--config.method.optimizer.learning_rate=0.1",
]


@pytest.fixture
def small(tmp_path, monkeypatch):
  """-> function: arguments of the small experiment in a workdir under tmp_path."""
  monkeypatch.chdir(ROOT)

  def arguments(name="run", *overrides):
    return replaced([*SMALL, f"--workdir={tmp_path / name}"], *overrides)

  return arguments


@pytest.fixture
def launch():
  """-> function: starts `python -m hamu_jax.main` in a process of its own."""
  processes = []

  def start(arguments, devices=1, **environment):
    process = subprocess.Popen(
      [sys.executable, "-m", *arguments],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=os.environ
      # Of a flag that is given twice the last counts.
      | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"}
      | environment,
    )
    processes.append(process)
    return process

  yield start
  for process in processes:
    process.kill()
    process.wait()
