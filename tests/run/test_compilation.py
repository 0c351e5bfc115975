"""Tests of the cache of compiled programs."""

import os
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from hamu_jax.run import compilation

_OPTIONS = (
  "jax_compilation_cache_dir",
  "jax_compilation_cache_max_size",
  "jax_persistent_cache_min_compile_time_secs",
)
_HIT = "/jax/compilation_cache/cache_hits"


@pytest.fixture
def no_folder():
  """JAX without a folder of compiled programs; puts back the options of the tests."""
  before = {name: getattr(jax.config, name) for name in _OPTIONS}
  jax.config.update("jax_compilation_cache_dir", None)
  jax_cache.reset_cache()
  with warnings.catch_warnings():
    yield
  for name, value in before.items():
    jax.config.update(name, value)
  jax_cache.reset_cache()


@pytest.fixture
def hits(no_folder):
  """The number of programs that were taken from the folder; a list, whose length it is."""
  found = []

  def count(event, **_):
    found.extend([event] * (event == _HIT))

  jax.monitoring.register_event_listener(count)
  yield found
  jax.monitoring.unregister_event_listener(count)


def _fresh():
  """What a later process would compute: 0 + 1 + ... + 9, with nothing compiled."""
  jax.clear_caches()
  return int(jax.jit(lambda n: jnp.sum(jnp.arange(10)) + n)(0))


def test_a_program_is_compiled_once(hits, tmp_path):
  folder = compilation.use(str(tmp_path / "compiled"))
  assert folder.parent == tmp_path / "compiled"
  assert _fresh() == 45 and not hits and list(folder.iterdir())
  entries = {path: path.read_bytes() for path in folder.iterdir()}
  assert _fresh() == 45 and hits
  assert {path: path.read_bytes() for path in folder.iterdir()} == entries


@pytest.mark.parametrize("at", [0, 0.5, 0.99])
def test_a_damaged_entry_costs_its_compilation(hits, tmp_path, at):
  folder = compilation.use(str(tmp_path))
  assert _fresh() == 45
  for path in folder.iterdir():
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)
  with warnings.catch_warnings(record=True) as said:
    assert _fresh() == 45
  assert not said and not hits
  for path in folder.iterdir():
    path.write_bytes(path.read_bytes()[:100])
  assert _fresh() == 45 and not hits


def test_without_the_cache(no_folder, tmp_path, monkeypatch):
  assert compilation.use(compilation.OFF) is None
  (tmp_path / "file").touch()
  assert compilation.use(str(tmp_path / "file")) is None
  monkeypatch.setattr(compilation, "_LEAST_FREE_BYTES", 2**80)
  assert compilation.use(str(tmp_path)) is None
  assert jax.config.jax_compilation_cache_dir is None


def test_the_folder_of_jax_itself_stays(no_folder, tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
  assert compilation.use(str(tmp_path / "other")) is None
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_the_folder_of_the_user(no_folder, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  folder = compilation.use(compilation.AUTO)
  assert folder.parent == tmp_path / "hamu_jax" / "compiled"


def test_the_oldest_entries_go_first(no_folder, tmp_path, monkeypatch):
  folder = compilation.use(str(tmp_path))
  for age in range(5):
    (folder / str(age)).write_bytes(bytes(10))
    os.utime(folder / str(age), (1e9 - age, 1e9 - age))
  monkeypatch.setattr(compilation, "_MOST_BYTES", 25)
  jax.config.update("jax_compilation_cache_dir", None)
  assert compilation.use(str(tmp_path)) == folder
  assert sorted(path.name for path in folder.iterdir()) == ["0", "1"]
