"""Weights from and to Hugging Face folders, what it costs, and what does not fit."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from hamu_jax.errors import UserError
from hamu_jax.models import llama, llama_config, llama_weights

_INDEX = "model.safetensors.index.json"


def _tensors(folder):
  tensors = {}
  for file in folder.glob("*.safetensors"):
    tensors |= safetensors.numpy.load_file(file)
  return tensors


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000, 1])
def test_what_was_read_is_written_again(any_llama, tmp_path, shard_bytes):
  """Loss-free, in one file, in several, and with a file for each tensor."""
  llama_weights.save_folder(tmp_path, any_llama.params, any_llama.config, shard_bytes=shard_bytes)
  theirs, ours = _tensors(any_llama.folder), _tensors(tmp_path)
  assert set(theirs) == set(ours)
  for name, value in theirs.items():
    assert value.dtype == ours[name].dtype
    np.testing.assert_array_equal(value, ours[name])
  assert llama_config.read_config(tmp_path) == any_llama.config
  files = sorted(tmp_path.glob("*.safetensors"))
  if shard_bytes == 10**9:
    assert [file.name for file in files] == ["model.safetensors"]
  else:
    index = json.loads((tmp_path / _INDEX).read_text())
    assert set(index["weight_map"]) == set(theirs)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in theirs.values())
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) == (len(theirs) if shard_bytes == 1 else len(files))
    assert all(file.stat().st_size < 70_000 for file in files if shard_bytes == 60_000)
  again = llama_weights.load_folder(tmp_path, llama.abstract_params(any_llama.model), any_llama.config)
  jax.tree.map(np.testing.assert_array_equal, again, any_llama.params)


def test_other_dtypes(tiny_llama, tmp_path):
  model = tiny_llama.model.clone(param_dtype=jnp.bfloat16)
  params = llama_weights.load_folder(tiny_llama.folder, llama.abstract_params(model), tiny_llama.config)
  jax.tree.map(
    lambda left, right: np.testing.assert_array_equal(left, right.astype(jnp.bfloat16)),
    params,
    tiny_llama.params,
  )
  llama_weights.save_folder(tmp_path, params, tiny_llama.config)
  assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
  assert {value.dtype.name for value in _tensors(tmp_path).values()} == {"bfloat16"}
  # And back, from 16 bits on disk to 32 in the model.
  wide = llama_weights.load_folder(tmp_path, llama.abstract_params(tiny_llama.model), tiny_llama.config)
  jax.tree.map(
    np.testing.assert_array_equal, wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
  )


class _Counting(llama_weights.SafetensorsFolder):
  """Remembers how much of each tensor was read."""

  def __init__(self, path):
    super().__init__(path)
    self.reads = []

  def read(self, name, index):
    value = super().read(name, index)
    self.reads.append(value.size / np.prod(self.shapes[name]))
    return value


def test_each_device_reads_its_own_part(tiny_llama):
  mesh = jax.sharding.Mesh(jax.devices(), ("model",))
  specs = {"q_proj": (None, None, "model"), "down_proj": (None, "model"), "embedding": ("model",)}

  def shard(path, leaf):
    spec = next((specs[key.key] for key in path if key.key in specs), ())
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  like = jax.tree_util.tree_map_with_path(shard, llama.abstract_params(tiny_llama.model))
  source = _Counting(tiny_llama.folder)
  params = llama_weights.load(source, like, tiny_llama.config, where="here")
  jax.tree.map(np.testing.assert_array_equal, params, tiny_llama.params)
  placed = jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted.sharding, params, like)
  assert jax.tree.all(placed)
  # Two layers of two projections, and the embedding: a quarter of each by four devices.
  assert source.reads.count(0.25) == 4 * 5
  assert set(source.reads) == {0.25, 1.0}


_MADE_UP = llama_config.LlamaConfig(1024, 1024, 64, 8, 8, 8, 128)
_LARGEST = 4 * _MADE_UP.hidden_size**2
_MIB = 2**20


def _write_made_up(folder):
  """A folder of zeros as large as the made-up model, in two shards; returns its bytes."""
  config = _MADE_UP
  like = llama.abstract_params(llama.Llama(config))
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  llama_weights.save_folder(folder, params, config, shard_bytes=size // 2)
  return size


def test_what_is_staged_is_two_tensors(tmp_path):
  size = _write_made_up(tmp_path)
  like = llama.abstract_params(llama.Llama(_MADE_UP))
  tracemalloc.start()
  try:
    params = llama_weights.load_folder(tmp_path, like, _MADE_UP)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == size
  # On a CPU, device memory is not traced: what is left is what was staged, and Python's objects.
  assert peak < 2 * _LARGEST + _MIB


_RESIDENT = """
import pathlib, sys
import jax
from hamu_jax.models import llama, llama_config, llama_weights
def resident(field):
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
config = llama_config.read_config(sys.argv[1])
like = llama.abstract_params(llama.Llama(config))
jax.block_until_ready(jax.jit(lambda x: x + 1)(0.0))
before = resident("VmRSS")
params = llama_weights.load_folder(sys.argv[1], like, config)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_grows_by_the_model(tmp_path):
  size = _write_made_up(tmp_path)
  # Freed blocks go back at once, so that what is resident is what is held.
  environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
  grown = int(
    subprocess.run(
      [sys.executable, "-c", _RESIDENT, str(tmp_path)],
      env=environment,
      capture_output=True,
      check=True,
      text=True,
    ).stdout
  )
  # The model, one tensor on its way, and 21 MiB of XLA's for compiling, whatever the model. A copy
  # of a stack would take 12 more, a file that is read whole 71.
  assert size < grown < size + _LARGEST + 30 * _MIB


@pytest.fixture
def copy(tiny_llama, tmp_path):
  """A golden folder that may be damaged."""
  folder = tmp_path / "copy"
  shutil.copytree(tiny_llama.folder, folder)
  return folder


def _load(folder, tiny_llama):
  return llama_weights.load_folder(folder, llama.abstract_params(tiny_llama.model), tiny_llama.config)


_UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda t: t.pop(_UP), f"tensor '{_UP}' is missing; give the weights of this model"),
    (lambda t: t.pop("lm_head.weight"), "tensor 'lm_head.weight' is missing"),
    (
      lambda t: t.update({_UP: t[_UP].T.copy()}),
      rf"tensor '{_UP}' has shape \(64, 112\), this model's has \(112, 64\)",
    ),
    (lambda t: t.update({_UP.replace("s.1", "s.2"): t[_UP]}), "layers.2.*is unknown"),
    (lambda t: t.update({_UP.replace("weight", "bias"): t[_UP]}), "up_proj.bias' is unknown"),
  ],
)
def test_tensors_that_do_not_fit(tiny_llama, copy, change, message):
  tensors = _tensors(copy)
  change(tensors)
  safetensors.numpy.save_file(tensors, copy / "model.safetensors")
  with pytest.raises(UserError, match=message):
    _load(copy, tiny_llama)


def test_tensors_that_mean_nothing(read_llama, golden, tmp_path):
  case = read_llama("gqa_tied", golden)
  tensors = _tensors(case.folder)
  extra = {
    # Of Llama 2's first release, and of tied models that were saved with both.
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
    "lm_head.weight": tensors["model.embed_tokens.weight"],
  }
  safetensors.numpy.save_file(tensors | extra, tmp_path / "model.safetensors")
  assert not llama_weights.has_own_output(llama_weights.SafetensorsFolder(tmp_path))
  found = llama_weights.load_folder(tmp_path, llama.abstract_params(case.model), case.config)
  jax.tree.map(np.testing.assert_array_equal, found, case.params)


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("model.safetensors", None, "holds neither model.safetensors nor"),
    ("model.safetensors", "{", "model.safetensors: cannot be read as a safetensors file"),
    (_INDEX, "{}", "cannot be read as an index of weights"),
    (_INDEX, "[]", "JSON list where an object"),
    (_INDEX, '{"weight_map": {"a": 3}}', "cannot be read as an index of weights"),
    (_INDEX, '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "00001.*is missing"),
    (_INDEX, '{"weight_map": {"a": "../copy/model.safetensors"}}', "shard '../copy.*is missing"),
  ],
)
def test_damaged_folders(tiny_llama, copy, name, text, message):
  if name == _INDEX:
    (copy / "model.safetensors").rename(copy / "other.safetensors")
  (copy / name).unlink(missing_ok=True)
  if text is not None:
    (copy / name).write_text(text)
  with pytest.raises(UserError, match=message):
    _load(copy, tiny_llama)


def test_weights_are_never_overwritten(tiny_llama, copy):
  with pytest.raises(UserError, match="holds model.safetensors already; choose an empty folder"):
    llama_weights.save_folder(copy, tiny_llama.params, tiny_llama.config)
