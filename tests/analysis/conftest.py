"""What the tests of geometry have in common."""

import jax
import numpy as np
import pytest

from hamu_jax import models
from hamu_jax.config import default as config_lib
from hamu_jax.run import rundir
from tests.analysis import perceptrons


@pytest.fixture
def make_run(tmp_path):
  """-> function: a run directory on the digits with multilayer perceptrons of random weights."""

  def make(retain=np.arange(0, 400), forget=np.arange(400, 460), **data):
    path = tmp_path / "run"
    path.mkdir()
    config = config_lib.default_config()
    config.data.update(source="digits", mean=(0.3,), std=(0.4,), **data)
    config.model.name = "mlp"
    rundir.write_json(path / "config.json", config.to_dict())
    np.savez(path / "split.npz", retain=retain.astype(np.int32), forget=forget.astype(np.int32))
    for seed, name in enumerate(("original", "unlearned")):
      float32 = jax.tree.map(np.float32, perceptrons.variables(seed))
      models.save_weights(path / f"{name}.safetensors", float32)
    return path

  return make
