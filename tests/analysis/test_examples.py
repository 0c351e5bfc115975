"""The examples that a run's split names."""

import json

import numpy as np

from hamu_jax.analysis import examples as examples_lib
from hamu_jax.config import default as config_lib


def test_a_run_that_is_older_than_a_field_has_its_default(make_run):
  path = make_run()
  now = examples_lib.load_run(path, max_examples=100, seed=0)
  config = json.loads((path / "config.json").read_text())
  del config["data"]["forget_set"], config["data"]["train_split"], config["model"]["stages"]
  (path / "config.json").write_text(json.dumps(config))
  then = examples_lib.load_run(path, max_examples=100, seed=0)
  np.testing.assert_array_equal(then.examples.forget.images, now.examples.forget.images)


def test_examples_are_the_rows_of_the_split(make_run):
  rows = np.array([3, 900, 4, 5, 6])
  run = examples_lib.load_run(make_run(forget=rows), max_examples=100, seed=0)
  dataset = config_lib.load_dataset(run.config.data)
  np.testing.assert_array_equal(run.examples.forget.images, dataset.train.images[rows])
  np.testing.assert_array_equal(run.examples.forget.labels, dataset.train.labels[rows])
  # Drawn from the 400 rows, each once.
  assert len(run.examples.retain.labels) == 100
  wanted = dataset.train.images[:400].reshape(400, -1)
  drawn = run.examples.retain.images.reshape(100, -1)
  assert len(np.unique(drawn, axis=0)) == 100
  assert {tuple(image) for image in drawn} <= {tuple(image) for image in wanted}
