"""The geometry command on a small run made by hand."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from hamu_jax.analysis import geometry
from tests.analysis import perceptrons


def test_tables():
  values = dict.fromkeys(("variance_ratio", "variance", "wasserstein", "silhouette", "svm", "knn"), 0.25)
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
  assert above.splitlines()[2].split() == ["before", "global", *["0.25"] * 6]
  assert above.splitlines()[3].split() == ["before", "class-wise", *["-"] * 6]
  assert below.splitlines()[2].split() == ["before", "retain", "1.5", "0.5", "2e-05", "36", "10/20/50/100"]


@pytest.mark.parametrize(
  "arguments, message",
  (
    ([], "required: --run"),
    (["--run=/no/such"], r"--run=/no/such: it has no config.json"),
    (["--run=RUN", "--landscape_points=4"], "'4': choose an odd number of at least 3"),
    (["--run=RUN", "--max_examples=many"], "'many': choose a whole number of at least 5"),
    (["--run=RUN", "--seed=-1"], "'-1': choose a whole number of at least 0"),
    (["--run=RUN", "--lanscape_points=5"], "unrecognized arguments: --lanscape_points=5"),
    (["--run=RUN", "--normalization=layer"], "invalid choice: 'layer'"),
    (["--run=RUN", "--before=retrained"], r"--before=retrained: .*retrained.safetensors does not"),
    (["--run=RUN", "--after=orig"], "--after=orig: .*choose one of original, retrained, unlearned"),
    (["--run=RUN", "--after=RUN/config.json"], "config.json: cannot be read as a safetensors file"),
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
    ({"retain": np.arange(9)}, "cannot be read as retain and forget indices .*forget"),
    ({"retain": np.arange(9), "forget": np.arange(9.0)}, "forget is float64 of shape"),
    (
      {"retain": np.arange(9), "forget": np.arange(1430, 1440)},
      r"forget indices 1430..1439 are not all among the 1438 training examples",
    ),
    ({"retain": np.arange(9), "forget": np.arange(-1, 8)}, r"forget indices -1..7 are not all"),
    ({"retain": np.arange(9), "forget": np.arange(3)}, "the forget set has 3 examples.*at least 5"),
    ({"retain": np.array([{}] * 9), "forget": np.arange(9)}, "cannot be read as retain and forget indices"),
  ),
)
def test_a_split_that_cannot_be_used(make_run, capsys, split, message):
  path = make_run()
  np.savez(path / "split.npz", **split)
  assert geometry.run(["geometry", f"--run={path}"]) == 2
  _assert_one_line(capsys, message)


def test_a_run_without_split_or_of_another_version(make_run, capsys):
  path = make_run()
  (path / "split.npz").unlink()
  assert geometry.run(["geometry", f"--run={path}"]) == 2
  _assert_one_line(capsys, "split.npz does not exist")
  config = json.loads((path / "config.json").read_text())
  del config["data"]
  (path / "config.json").write_text(json.dumps(config))
  assert geometry.run(["geometry", f"--run={path}"]) == 2
  _assert_one_line(
    capsys, "config.json: it has no section 'data'; run the experiment again with this version"
  )


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
  assert report["examples"] == {"retain": 60, "forget": 60, "test": 60}
  assert geometry.tables(report) in output
  for name in ("before", "after"):
    assert 0 < report["entanglement"][name]["global"]["wasserstein"] < 1
    assert list(report["landscape"][name]) == ["retain", "forget", "test"]
    assert report["landscape"][name]["test"]["loss"] > 0
  before, after = (report["entanglement"][name]["global"] for name in ("before", "after"))
  assert before != after

  run = geometry.load_run(path, max_examples=30, seed=0)
  features = geometry.extract_features(
    run, {"before": perceptrons.variables(0), "after": perceptrons.variables(0)}
  )
  places = geometry.project(features, seed=1)
  again = geometry.project(features, seed=1)
  for sets, repeated in zip(places.values(), again.values()):
    assert sets.retain.shape == sets.forget.shape == (30, 2)
    np.testing.assert_array_equal(sets.retain, repeated.retain)
  # The same features twice: each point and its twin are nearest neighbours, and stay close.
  moved = np.linalg.norm(places["before"].retain - places["after"].retain, axis=1)
  assert np.median(moved) < 0.5 * places["before"].retain.std()
