"""The examples of the pages run, and do what the pages say."""

import json
import pathlib
import re
import runpy
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from hamu_jax import data, main, models
from hamu_jax.engine import objectives
from hamu_jax.run import rundir
from tests.arguments import replaced

RESULTS_PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "results.md"
SHORT = [
  "--config.train.epochs=3",
  "--config.train.evaluate_epochs=0",
  "--config.train.batch_size=256",
  "--config.method.epochs=2",
]


def run(example, workdir, *overrides):
  """-> the summary of a short run of an example's configuration."""
  arguments = ["hamu_jax.main", f"--config={example}", f"--workdir={workdir}", *SHORT]
  assert main.run(replaced(arguments, *overrides)) == 0
  return rundir.read_json(workdir / "summary.json")


def test_a_method(examples, tmp_path):
  summary = run(examples / "add_method.py", tmp_path / "run")
  assert summary["method"] == "uniform"
  results = summary["results"]
  # The forgotten digit is no longer known, the others are.
  assert results["unlearned"]["forget"]["entropy"] > 5 * results["original"]["forget"]["entropy"]
  assert results["unlearned"]["retain"]["accuracy"] > 0.9
  steps = [row for row in rundir.read_metrics(tmp_path / "run").rows if row["stage"] == "unlearn"]
  assert all("forget_uniform" in row for row in steps if row["split"] == "step")


def test_the_term_of_the_method_is_what_it_says(examples):
  term = runpy.run_path(str(examples / "add_method.py"))["uniform_cross_entropy"]
  logits = np.random.default_rng(0).normal(size=(4, 3))
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  got = term(objectives.Outputs(jnp.asarray(logits)), None)
  np.testing.assert_allclose(got, -np.log(p).mean(axis=1), rtol=1e-5)


def test_a_modality(examples, tmp_path, capsys):
  example = examples / "tabular.py"
  arguments = ["hamu_jax.main", f"--config={example}"]
  assert main.run([*arguments, f"--workdir={tmp_path / 'run'}"]) == 0
  results = rundir.read_json(tmp_path / "run" / "summary.json")["results"]
  assert set(results) == {"original", "retrained", "unlearned"}
  assert results["original"]["retain"]["accuracy"] > 0.98
  assert results["unlearned"]["forget"]["loss"] > 10 * results["original"]["forget"]["loss"]
  assert 0 < results["unlearned"]["tug_of_war"] <= 1
  with np.load(tmp_path / "run" / "split.npz") as split:
    assert len(split["forget"]) == 46 and not set(split["forget"]) & set(split["retain"])
  # Two devices compute the same; fields of other modalities are refused.
  pmap = ["--config.pairing=pmap", "--config.devices=2", f"--workdir={tmp_path / 'pmap'}"]
  assert main.run([*arguments, *pmap, f"--config.stage_cache={tmp_path / 'run' / 'stages'}"]) == 0
  shared = rundir.read_json(tmp_path / "pmap" / "summary.json")["results"]
  assert shared["unlearned"]["forget"]["loss"] == pytest.approx(
    results["unlearned"]["forget"]["loss"], rel=1e-2
  )
  capsys.readouterr()
  assert main.run([*arguments, "--config.data.forget_class=(1,)"]) == 2
  assert "config.data.forget_class=(1,): nothing reads it here" in capsys.readouterr().err


def test_a_model(examples, tmp_path):
  summary = run(examples / "add_model.py", tmp_path / "run", "--config.model.depth=1")
  assert summary["results"]["retrained"]["forget"]["accuracy"] == 0
  # What a run leaves, another reads.
  model = models.build_model("mixer", num_classes=10, width=24, depth=1)
  template = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  like = {"params": template["params"], "batch_stats": {}}
  loaded = models.load_weights(tmp_path / "run" / "unlearned.safetensors", like)
  assert jax.tree.structure(loaded) == jax.tree.structure(like)
  count = runpy.run_path(str(examples / "add_model.py"))["count_parameters"]
  # Embedding, head, and of each block a norm, the mixing of 8 rows and that of 32 channels.
  block = 2 * 32 + (8 * 8 + 8) + (32 * 32 + 32)
  assert count("mixer") == 8 * 32 + 32 + 32 * 10 + 10 + 2 * block
  assert count("mixer_deep") - count("mixer") == 6 * block


def test_a_dataset_and_its_results(examples, tmp_path, capsys):
  example = runpy.run_path(str(examples / "add_dataset.py"))
  example["write_digits"](tmp_path / "digits.npz")
  path = f"--config.data.path={tmp_path / 'digits.npz'}"
  summary = run(examples / "add_dataset.py", tmp_path / "run", path)
  # The same images as those it was made of.
  assert summary["provenance"]["data_fingerprint"] == data.load("digits").fingerprint

  results = runpy.run_path(str(examples / "read_results.py"))
  again, accuracies, forget_loss = results["read_run"](tmp_path / "run")
  assert again == summary
  assert accuracies["unlearned"]["test"] == summary["results"]["unlearned"]["test"]["accuracy"]
  assert len(forget_loss) == summary["steps"]
  tensors, forgotten = results["read_weights"](tmp_path / "run")
  assert len(forgotten) == 144
  assert tensors["classifier.weight"].shape == (10, 64)
  ((settings, accuracy),) = results["read_many"](tmp_path / "run")
  assert settings == {"method.name": "hamu-q"}
  assert (accuracy.mean, accuracy.count) == (accuracies["unlearned"]["test"], 1)
  results["main"](tmp_path / "run")
  assert "144 examples forgotten" in capsys.readouterr().out

  explained = RESULTS_PAGE.read_text()
  for name in (path.name for path in (tmp_path / "run").iterdir()):
    assert name.removesuffix(".safetensors") in explained, name
  assert set(summary) <= set(re.findall(r"`(\w+)`", explained))
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
  names = {name for row in rows for name in row if not name.startswith("branch_")}
  # Parts of the criterion's margin, see `HamuDiagnostics`.
  assert names - {"stopping_rhs", "stopping_constraint"} <= set(re.findall(r"`(\w+)`", explained))


def test_a_dataset_that_is_none_is_one_line(examples, tmp_path, capsys):
  arguments = ["hamu_jax.main", f"--config={examples / 'add_dataset.py'}", f"--workdir={tmp_path / 'run'}"]
  assert main.run([*arguments, f"--config.data.path={tmp_path / 'no.npz'}"]) == 2
  assert len(capsys.readouterr().err.splitlines()) == 1


class _Tensor(np.ndarray):
  """As much of a tensor of PyTorch as a conversion needs."""

  float = lambda self: self.astype(np.float32)
  is_floating_point = lambda self: self.dtype.kind == "f"
  numpy = lambda self: np.asarray(self)


def test_a_checkpoint_of_pytorch(examples, tmp_path, monkeypatch, capsys):
  model = models.build_model("vit_s", width=24, depth=2, heads=3, num_classes=5)
  init = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
  variables = {"params": init["params"], "batch_stats": {}}
  tensors = safetensors.numpy.load(models.weights_bytes(variables))
  state = {f"module.vit.{name}": value.astype(np.float64).view(_Tensor) for name, value in tensors.items()}
  state |= {"module.normalize.mean": np.full(3, 0.5).view(_Tensor)}

  def load(path, *, map_location, weights_only):
    assert weights_only and map_location == "cpu"
    return {"state_dict": state, "epoch": 3} if path == "whole.pth.tar" else state

  monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
  example = runpy.run_path(str(examples / "convert_checkpoint.py"))
  for path in ("whole.pth.tar", "state.pth"):
    example["convert"](path, tmp_path / "weights.safetensors")
    assert capsys.readouterr().out == '--config.data.mean="(0.5, 0.5, 0.5)"\n'
    loaded = models.load_weights(tmp_path / "weights.safetensors", variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_a_loop_of_ones_own(examples):
  losses = np.array(runpy.run_path(str(examples / "own_loop.py"))["main"](steps=3))
  retain, forget = losses.T
  assert (np.diff(retain) < 0).all()
  # Asked for 0.002 a step, to first order.
  assert (np.diff(forget) > 0.0015).all()
