"""The geometry command on a small run made by hand, and each of its parts against NumPy."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from hamu_jax import models
from hamu_jax.analysis import geometry
from hamu_jax.config import default as config_lib
from hamu_jax.metrics import classification
from hamu_jax.paired import Paired
from hamu_jax.run import rundir
from sam_jax import entanglement


def _variables(seed):
  rng = np.random.default_rng(seed)
  return {
    "params": {
      "hidden0": {"kernel": rng.normal(size=(64, 64)) / 8, "bias": rng.normal(size=64) / 8},
      "classifier": {"kernel": rng.normal(size=(64, 10)) / 4, "bias": np.zeros(10)},
    },
    "batch_stats": {},
  }


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
      float32 = jax.tree.map(np.float32, _variables(seed))
      models.save_weights(path / f"{name}.safetensors", float32)
    return path

  return make


def _forward(variables, examples):
  """Hidden features and losses of the perceptron, in float64."""
  p = variables["params"]
  x_NxF = ((examples.images / 255 - 0.3) / 0.4).reshape(len(examples.images), -1)
  features = np.maximum(x_NxF @ p["hidden0"]["kernel"] + p["hidden0"]["bias"], 0)
  logits = features @ p["classifier"]["kernel"] + p["classifier"]["bias"]
  losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), examples.labels]
  return features, losses


def test_examples_are_the_rows_of_the_split(make_run):
  rows = np.array([3, 900, 4, 5, 6])
  run = geometry.load_run(make_run(forget=rows), max_examples=100, seed=0)
  dataset = geometry.config_lib.load_dataset(run.config.data)
  np.testing.assert_array_equal(run.examples.forget.images, dataset.train.images[rows])
  np.testing.assert_array_equal(run.examples.forget.labels, dataset.train.labels[rows])
  # Drawn from the 400 rows, each once.
  assert len(run.examples.retain.labels) == 100
  wanted = dataset.train.images[:400].reshape(400, -1)
  drawn = run.examples.retain.images.reshape(100, -1)
  assert len(np.unique(drawn, axis=0)) == 100
  assert {tuple(image) for image in drawn} <= {tuple(image) for image in wanted}


def test_features_are_the_classifiers_inputs(make_run):
  run = geometry.load_run(make_run(), max_examples=1000, seed=0)
  variables = {"a": _variables(0), "b": _variables(1)}
  # More than one microbatch of 256, and one that is not full.
  features = geometry.extract_features(run, variables)
  for name, sets in features.items():
    for role, got in sets._asdict().items():
      expected, _ = _forward(variables[name], getattr(run.examples, role))
      np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_measures_are_global_and_class_wise():
  rng = np.random.default_rng(0)
  features = Paired(rng.normal(size=(60, 5)), rng.normal(size=(40, 5)))
  examples = Paired(
    *(geometry.Examples(None, np.arange(size) % classes) for size, classes in ((60, 3), (40, 2)))
  )
  report = geometry.measure(features, examples, seed=4)
  labels = {"retain_labels": examples.retain.labels, "forget_labels": examples.forget.labels}
  assert report["global"]["variance_ratio"] == entanglement.variance_entanglement(*features)
  assert report["class_wise"]["variance"] == pytest.approx(
    entanglement.variance_entanglement(*features, **labels) / 1300
  )
  for name in ("wasserstein", "silhouette", "knn"):
    function = getattr(entanglement, f"{name}_entanglement")
    assert report["global"][name] == function(*features)
    assert report["class_wise"][name] == function(*features, **labels)


def test_measures_that_a_split_has_not_are_none():
  """A whole class is forgotten, and of few examples: no class-wise measure, no ten neighbours."""
  rng = np.random.default_rng(0)
  features = Paired(rng.normal(size=(20, 3)), rng.normal(size=(6, 3)))
  examples = Paired(geometry.Examples(None, np.arange(20) % 3), geometry.Examples(None, np.full(6, 7)))
  report = geometry.measure(features, examples, seed=0)
  assert set(report["class_wise"].values()) == {None}
  assert [name for name, value in report["global"].items() if value is None] == ["knn"]


def test_landscapes_in_one_program(make_run, monkeypatch):
  """The middle is the mean loss of each set, of unequal sizes; the program is traced once."""
  run = geometry.load_run(make_run(), max_examples=1000, seed=0)
  traces = []
  per_example = classification.per_example
  monkeypatch.setattr(
    classification, "per_example", lambda *args: (traces.append(None), per_example(*args))[1]
  )
  variables = {name: jax.tree.map(np.float32, _variables(seed)) for seed, name in enumerate("ab")}
  coordinates, grids = geometry.compute_landscapes(
    run, variables, points=3, max_examples=300, normalization="filter", seed=0
  )
  assert len(traces) == 1
  np.testing.assert_array_equal(coordinates, [-1, 0, 1])
  for name, sets in grids.items():
    for role, size in (("retain", 300), ("forget", 60)):
      examples = geometry.Examples(*(array[:size] for array in getattr(run.examples, role)))
      _, losses = _forward(_variables("ab".index(name)), examples)
      grid = getattr(sets, role)
      assert grid[1, 1] == pytest.approx(losses.mean(), rel=1e-4)
      assert len(np.unique(grid)) == 9


def test_tables():
  values = dict.fromkeys(("variance_ratio", "variance", "wasserstein", "silhouette", "knn"), 0.25)
  flat = {
    "loss": 1.5,
    "variability": 0.5,
    "gradient": 2e-5,
    "basin": 36.0,
    "profile": (10.0, 20.4, 50.0, 99.9),
  }
  report = {
    "entanglement": {"before": {"global": values, "class_wise": dict.fromkeys(values)}},
    "landscape": {"before": {"retain": flat, "forget": flat}},
  }
  above, below = geometry.tables(report).split("\n\n")
  for table in (above, below):
    lines = table.splitlines()
    assert len(set(map(len, lines))) == 1 and len(lines) == 4
  assert above.splitlines()[2].split() == ["before", "global", *["0.25"] * 5]
  assert above.splitlines()[3].split() == ["before", "class-wise", *["-"] * 5]
  assert below.splitlines()[2].split() == ["before", "retain", "1.5", "0.5", "2e-05", "36", "10/20/50/100"]


@pytest.mark.parametrize(
  "arguments, message",
  (
    ([], "required: --run"),
    (["--run=/no/such"], r"--run=/no/such: it has no config.json"),
    (["--run=RUN", "--landscape_points=4"], "'4': choose an odd number from 3 on"),
    (["--run=RUN", "--max_examples=many"], "'many': choose a whole number from 5 on"),
    (["--run=RUN", "--seed=-1"], "'-1': choose a whole number from 0 on"),
    (["--run=RUN", "--lanscape_points=5"], "unrecognized arguments: --lanscape_points=5"),
    (["--run=RUN", "--normalization=layer"], "invalid choice: 'layer'"),
    (["--run=RUN", "--before=retrained"], r"--before=retrained: .*retrained.safetensors does not"),
    (["--run=RUN", "--after=orig"], "--after=orig: .*choose one of original, retrained, unlearned"),
    (["--run=RUN", "--after=RUN/config.json"], "config.json: not a safetensors file"),
    (["--run=RUN", "--out=RUN/config.json"], "--out=.*choose another folder"),
  ),
)
def test_bad_input_gets_one_line_and_status_2(make_run, capsys, arguments, message):
  path = make_run()
  arguments = [argument.replace("RUN", str(path)) for argument in arguments]
  assert geometry.run(["geometry", *arguments]) == 2
  _assert_one_line(capsys, message)
  assert not (path / "geometry").exists()


@pytest.mark.parametrize(
  "split, message",
  (
    ({"retain": np.arange(9)}, "holds no retain and forget rows .*forget"),
    ({"retain": np.arange(9), "forget": np.arange(9.0)}, "forget is float64 of shape"),
    (
      {"retain": np.arange(9), "forget": np.arange(1430, 1440)},
      r"forget rows 1430..1439 are not all among the 1438 training rows",
    ),
    ({"retain": np.arange(9), "forget": np.arange(-1, 8)}, r"forget rows -1..7 are not all"),
    ({"retain": np.arange(9), "forget": np.arange(3)}, "the forget set has 3 rows.*5 at least"),
    ({"retain": np.array([{}] * 9), "forget": np.arange(9)}, "holds no retain and forget rows"),
  ),
)
def test_a_split_that_cannot_be_used(make_run, capsys, split, message):
  path = make_run()
  np.savez(path / "split.npz", **split)
  assert geometry.run(["geometry", f"--run={path}"]) == 2
  _assert_one_line(capsys, message)


def test_a_run_without_split_or_of_another_version(make_run, capsys):
  path = make_run()
  config = json.loads((path / "config.json").read_text())
  del config["data"]["source"]
  (path / "config.json").write_text(json.dumps(config))
  assert geometry.run(["geometry", f"--run={path}"]) == 2
  _assert_one_line(capsys, "config.json: .*source.*run the experiment again with this version")
  (path / "split.npz").unlink()
  assert geometry.run(["geometry", f"--run={path}"]) == 2
  _assert_one_line(capsys, "split.npz does not exist")


def _assert_one_line(capsys, message):
  error = capsys.readouterr().err.strip()
  assert error.startswith("error: ") and len(error.splitlines()) == 1, error
  assert re.search(message, error), error


@pytest.mark.parametrize("package, project", (("ot", "POT"), ("umap", "umap-learn")))
def test_missing_packages_are_named_at_once(make_run, capsys, monkeypatch, package, project):
  monkeypatch.setattr(geometry.importlib.util, "find_spec", lambda name: None if name == package else name)
  assert geometry.run(["geometry", f"--run={make_run()}"]) == 2
  _assert_one_line(capsys, rf"{project} is not installed; pip install 'hamu-jax\[analysis\]'")


# UMAP compiles for more than ten seconds.
@pytest.mark.slow
def test_the_command(make_run, tmp_path, capsys):
  path, out = make_run(), tmp_path / "figures"
  assert (
    geometry.run(
      [
        "geometry",
        f"--run={path}",
        f"--out={out}",
        "--max_examples=60",
        "--landscape_points=5",
        "--landscape_examples=32",
        f"--after={path / 'unlearned.safetensors'}",
      ]
    )
    == 0
  )
  output = capsys.readouterr().out
  for name in ("umap", "landscape"):
    with Image.open(out / f"{name}.png") as image:
      image.verify()
    assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
  report = json.loads((out / "geometry.json").read_text())
  assert report["models"]["after"] == str(path / "unlearned.safetensors")
  assert report["examples"] == {"retain": 60, "forget": 60}
  assert geometry.tables(report) in output
  for name in ("before", "after"):
    assert 0 < report["entanglement"][name]["global"]["wasserstein"] < 1
    assert report["landscape"][name]["forget"]["loss"] > 0
  before, after = (report["entanglement"][name]["global"] for name in ("before", "after"))
  assert before != after

  run = geometry.load_run(path, max_examples=30, seed=0)
  features = geometry.extract_features(run, {"before": _variables(0), "after": _variables(0)})
  places = geometry.project(features, seed=1)
  again = geometry.project(features, seed=1)
  for sets, repeated in zip(places.values(), again.values()):
    assert sets.retain.shape == sets.forget.shape == (30, 2)
    np.testing.assert_array_equal(sets.retain, repeated.retain)
  # The same features twice: each point and its twin are nearest neighbours, and stay close.
  moved = np.linalg.norm(places["before"].retain - places["after"].retain, axis=1)
  assert np.median(moved) < 0.5 * places["before"].retain.std()
