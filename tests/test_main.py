"""The command line: one whole experiment, and one clear line for each kind of bad input."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hamu_jax import main, models
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import loop as loop_lib
from hamu_jax.experiment import evaluate
from hamu_jax.run import progress
from tests.arguments import replaced


def test_one_command_runs_every_stage_and_a_second_reuses_them(small, tmp_path, capsys, monkeypatch):
  programs, dispatched = [], []
  compile_target = chunk_lib.compile_target

  def counted(*args, **kwargs):
    chunk = compile_target(*args, **kwargs)
    programs.append(chunk)

    def dispatch(*arguments):
      dispatched.append(chunk)
      return chunk(*arguments)

    return dispatch

  monkeypatch.setattr(chunk_lib, "compile_target", counted)
  chunks = []
  update = progress.Progress.update
  monkeypatch.setattr(progress.Progress, "update", lambda *args: (chunks.append(args[1]), update(*args)))
  assert main.run(small()) == 0
  output = capsys.readouterr().out
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())

  rows = [line.split() for line in output.splitlines()]
  # In two blocks, within 100 columns.
  models = [row[0] for row in rows if row and row[0] in summary["results"]]
  assert models == 2 * ["original", "retrained", "unlearned"]
  # Pretraining and retraining are the same program; each compiles once, whatever its chunks.
  assert len(programs) == 2
  assert [program._cache_size() for program in programs] == [1, 1]
  metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
  steps = {
    stage: [row["step"] for row in metrics if row["stage"] == stage and row["split"] == "step"]
    for stage in ("pretrain", "retrain", "unlearn")
  }
  for stage, numbers in steps.items():
    assert numbers == list(range(1, len(numbers) + 1)), stage
  # 1438 digits in batches of 128; 1294 without the forget class; two epochs of 21 batches of 64.
  assert [len(numbers) for numbers in steps.values()] == [36, 33, 42]
  # One device program a chunk, and several steps a chunk.
  assert len(dispatched) == len(chunks) < sum(map(len, steps.values()))
  assert summary["steps"] == 42
  assert summary["stop_reason"] == "finished after 42 applied steps"
  assert set(summary["results"]["unlearned"]) == {
    "retain",
    "forget",
    "test",
    "test_retain",
    "test_forget",
    "retain_forget_auc",
    "forget_test_auc",
    "tug_of_war",
    "tug_of_war_signed",
  }
  for name in (
    "tradeoff.png",
    "alignment.png",
    "config.json",
    "checkpoints",
    "tb",
    "unlearned.safetensors",
  ):
    assert (tmp_path / "run" / name).exists(), name

  dispatched.clear()
  assert main.run(small()) == 0
  assert not dispatched
  assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary

  shutil.rmtree(tmp_path / "run" / "stages")
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  assert main.run(small()) == 0
  again = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert again["results"] == summary["results"]


def test_it_unlearns(small, tmp_path):
  assert main.run(small()) == 0
  results = json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
  before, after = results["original"], results["unlearned"]
  assert before["forget"]["accuracy"] > 0.9
  assert after["forget"]["accuracy"] < before["forget"]["accuracy"] - 0.6
  assert after["retain"]["accuracy"] > before["retain"]["accuracy"] - 0.05
  assert results["retrained"]["forget"]["accuracy"] == 0
  assert 0 < after["tug_of_war"] <= 1
  # The exported weights are those of the unlearned model.
  weights = load_file(tmp_path / "run" / "unlearned.safetensors")
  assert all(np.isfinite(tensor).all() for tensor in weights.values())


def test_an_infeasible_run_says_by_how_much(small, tmp_path, capsys):
  arguments = small(
    "run",
    "--config.method.on_infeasible=stop",
    "--config.retrain=False",
    "--config.method.constraint_ratio=1.0",
  )
  assert main.run(arguments) == 0
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert summary["steps"] == 0
  reason = summary["stop_reason"]
  assert reason.startswith("infeasible after 0 applied steps: the constraint asks for 1 times")
  largest = float(reason.split("at most ")[1].split(" in every block")[0])
  assert 0 < largest < 1
  assert summary["results"]["unlearned"] == summary["results"]["original"]
  assert "tug_of_war" not in summary["results"]["unlearned"]

  # What it calls the largest feasible ratio is one.
  arguments = small(
    "other",
    "--config.method.on_infeasible=stop",
    "--config.retrain=False",
    f"--config.method.constraint_ratio={0.99 * largest}",
    "--config.method.max_steps=1",
    f"--config.stage_cache={tmp_path / 'run' / 'stages'}",
  )
  assert main.run(arguments) == 0
  assert json.loads((tmp_path / "other" / "summary.json").read_text())["steps"] == 1


BAD_INPUT = {
  "unknown field": (
    ["--config.method.constrain_ratio=1"],
    r"config.method.constrain_ratio: no such field; the nearest is config.method.constraint_ratio",
  ),
  "unknown flag": (["--wrkdir=x"], r"wrkdir"),
  "not a number": (["--config.method.constraint_ratio=abc"], r"constraint_ratio='abc': must be a number"),
  "no such config": (["--config=configs/nope.py"], r"configs/nope.py"),
  "unknown variant": (["--config=configs/cifar_hamu.py:huge"], r"huge.*cifar_hamu.py:smoke"),
  "unknown method": (
    ["--config.method.name=hamu"],
    r"config.method.name='hamu': choose from ft, ga.*hamu-q",
  ),
  "unknown model": (
    ["--config.model.name=resnet21"],
    r"config.model.name='resnet21': choose from.*resnet20",
  ),
  "unknown source": (
    ["--config.data.source=cifar"],
    r"config.data.source='cifar': choose from digits",
  ),
  "unknown pairing": (["--config.pairing=pmapp"], r"config.pairing='pmapp'.*did you mean 'pmap'"),
  "constraint above the radius": (
    ["--config.method.on_infeasible=stop", "--config.method.constraint_ratio=1.5"],
    r"constraint_ratio=1.5.*lower it to at most 1",
  ),
  "negative constraint": (
    ["--config.method.constraint_ratio=-0.1"],
    r"constraint_ratio=-0.1: must be at least 0",
  ),
  "odd devices": (
    ["--config.pairing=pmap", "--config.devices=3"],
    r"even number of devices.*got 3",
  ),
  "too many devices": (
    ["--config.pairing=pmap", "--config.devices=64"],
    r"config.devices=64: there are",
  ),
  "no such class": (
    ["--config.data.forget_class=(12,)"],
    r"class 12 does not exist; choose from 0, 1",
  ),
  "empty forget set": (
    ["--config.data.forget_class=()"],
    r"config.data.forget_class=\(\): needs at least 1 value",
  ),
  "empty retain set": (
    ["--config.data.forget_class=(0,1,2,3,4,5,6,7,8,9)"],
    r"retain set is empty",
  ),
  "no such folder": (["--config.data.source=parquet", "--config.data.path=/no/such"], r"/no/such"),
  "no network": (["--config.data.source=huggingface"], r"config.data.path.*hamu_jax:digits_hamu"),
  "warm-up": (
    ["--config.method.constraint=0.001", "--config.method.optimizer.warmup_epochs=1"],
    r"config.method.constraint=0.001: with warm-up",
  ),
  "NaN": (["--config.method.alpha=nan"], r"config.method.alpha=nan"),
  "unknown optimizer": (
    ["--config.method.optimizer.name=sdg"],
    r"config.method.optimizer.name='sdg': choose from sgd, adam, .*did you mean 'sgd'",
  ),
  "channels": (
    ["--config.data.mean=(0.1,0.2)", "--config.data.std=(1.,1.)"],
    r"config.data.mean.*1 channel",
  ),
  "missing weights": (["--config.model.weights=/no/such.safetensors"], r"/no/such.safetensors"),
}


def test_weights_of_nan_are_refused(small, tmp_path, capsys):
  variables = models.build_model("mlp", num_classes=10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  variables = {"params": jax.tree.map(lambda leaf: leaf * jnp.nan, variables["params"]), "batch_stats": {}}
  path = tmp_path / "nan.safetensors"
  models.save_weights(path, variables)
  assert main.run(small("run", f"--config.model.weights={path}")) == 2
  error = capsys.readouterr().err
  assert f"config.model.weights='{path}': holds NaN or infinite weights; give" in error
  assert len(error.strip().splitlines()) == 1
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("overrides", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line_and_status_2(small, tmp_path, capsys, overrides, message):
  assert main.run(small("run", *overrides)) == 2
  error = capsys.readouterr().err.strip()
  assert error.startswith("error: ")
  assert len(error.splitlines()) == 1
  assert re.search(message, error), error
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_config_is_required(capsys):
  assert main.run(["hamu_jax.main"]) == 2
  assert "--config is missing" in capsys.readouterr().err


def test_a_workdir_of_another_experiment_is_refused(small, capsys):
  brief = ["--config.method.max_steps=1", "--config.train.epochs=1", "--config.retrain=False"]
  assert main.run(small("run", *brief)) == 0
  capsys.readouterr()
  assert main.run(small("run", *brief, "--config.method.constraint_ratio=0.3")) == 2
  error = capsys.readouterr().err
  assert "belongs to another experiment" in error
  assert "config.method.constraint_ratio is 0.1 there and 0.3 here" in error


def test_damaged_stages_are_computed_again(small, tmp_path, capsys):
  brief = ["--config.method.max_steps=1", "--config.train.epochs=1", "--config.retrain=False"]
  assert main.run(small("run", *brief)) == 0
  before = json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
  stages = tmp_path / "run" / "stages"
  (original,), (unlearned,) = stages.glob("pretrain-*"), stages.glob("unlearn-*")
  # A model of equal shapes under another's name, and figures that somebody has improved.
  shutil.rmtree(unlearned)
  shutil.copytree(original, unlearned)
  evaluations = sorted(stages.glob("evaluate-*"))
  for folder in evaluations:
    text = (folder / "outcome.json").read_text()
    (folder / "outcome.json").write_text(text.replace('"accuracy": 0.', '"accuracy": 0.9'))
  capsys.readouterr()
  assert main.run(small("run", *brief)) == 0
  notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
  assert len(notes) == 1 + len(evaluations) and all("it is computed again" in note for note in notes)
  assert json.loads((tmp_path / "run" / "summary.json").read_text())["results"] == before


def test_a_run_may_only_train(small, tmp_path, capsys):
  arguments = ["hamu_jax.main", *(each for each in small()[1:] if not each.startswith("--config.method."))]
  brief = ["--config.method.name=none", "--config.train.epochs=1"]
  assert main.run(replaced(arguments, *brief)) == 0
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert list(summary["seconds"]) == ["pretrain", "retrain"]
  assert summary["results"].keys() == {"original", "retrained"}
  # 1438 digits in batches of 128.
  assert summary["steps"] == 12
  assert 0 <= summary["results"]["original"]["tug_of_war"] <= 1
  assert not (tmp_path / "run" / "unlearned.safetensors").exists()
  capsys.readouterr()
  assert main.run(replaced(arguments, *brief, "--config.method.epochs=2")) == 2
  assert "config.method.epochs=2.0: nothing reads it here" in capsys.readouterr().err


def test_models_from_elsewhere_are_evaluated_and_compared_with(small, tmp_path, capsys, monkeypatch):
  brief = ["--config.train.epochs=1", "--config.method.max_steps=1"]
  run, other, cache = tmp_path / "run", tmp_path / "other", f"--config.stage_cache={tmp_path / 'new'}"
  assert main.run(small("run", *brief, "--config.keep_every=1")) == 0
  wanted = json.loads((run / "summary.json").read_text())

  # Nothing of the retrained model is trained, and every comparison is the same.
  given = [f"--config.model.weights={run}", f"--config.retrained={run}", cache]
  untrained = [each for each in small("other", *brief, *given) if not each.startswith("--config.train.")]
  assert main.run(untrained) == 0
  summary = json.loads((other / "summary.json").read_text())
  assert summary["results"] == wanted["results"]
  assert (summary["seconds"]["pretrain"], summary["seconds"]["retrain"]) == (0, 0)
  assert {each.name.split("-")[0] for each in (tmp_path / "new").iterdir()} == {"unlearn", "evaluate"}

  def evaluated(*arguments):
    monkeypatch.setattr(loop_lib.Loop, "run", None)
    program = ["hamu_jax.evaluate", *small("evaluation", *brief)[1:], *arguments]
    return evaluate.run(program)

  # Its only step is the last.
  assert evaluated(f"--model={run / 'kept' / 'unlearn-000001'}", f"--retrained={run}") == 0
  found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["results"]
  assert found == {"model": wanted["results"]["unlearned"], "retrained": wanted["results"]["retrained"]}
  rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[-4:-1]]
  assert rows[1:] == ["model", "retrained"]
  for arguments, message in (
    ([], "--model is missing"),
    ([f"--model={tmp_path / 'nothing'}"], f"--model='{tmp_path / 'nothing'}': .*no such file"),
    ([f"--model={run}", "--adapter=any"], "--adapter=any: adapters are for language models"),
  ):
    assert evaluated(*arguments) == 2
    assert re.search(f"^error: {message}.*\n$", capsys.readouterr().err)


def test_lost_metrics_are_restored_from_the_cache(small, tmp_path, capsys):
  brief = ["--config.method.max_steps=1", "--config.train.epochs=1", "--config.retrain=False"]
  assert main.run(small("run", *brief)) == 0
  metrics = tmp_path / "run" / "metrics.jsonl"
  before = [json.loads(line) for line in metrics.read_text().splitlines()]
  metrics.write_bytes(b"")
  capsys.readouterr()
  assert main.run(small("run", *brief)) == 0
  rows = [json.loads(line) for line in metrics.read_text().splitlines()]
  # Each stage's final evaluation; its steps are gone.
  wanted = {(stage, split) for stage in ("pretrain", "unlearn") for split in ("retain", "forget", "test")}
  assert wanted <= {(row["stage"], row["split"]) for row in rows}
  assert all(row in before for row in rows)
  notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
  assert ["pretrain" in notes[0], "unlearn" in notes[1], len(notes)] == [True, True, 2]


@pytest.mark.slow
def test_the_digits_are_unlearned(launch, tmp_path):
  """The README's first command, as it is."""
  # This one spends its time running.
  process = launch(
    ["hamu_jax.main", "--config=configs/digits_hamu.py", f"--workdir={tmp_path / 'run'}"], XLA_FLAGS=""
  )
  assert process.wait(1500) == 0, process.stdout.read()
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  accuracy = {
    name: {split: values["accuracy"] for split, values in result.items() if isinstance(values, dict)}
    for name, result in summary["results"].items()
  }
  before, after = accuracy["original"], accuracy["unlearned"]
  assert summary["steps"] >= 20
  assert after["forget"] <= before["forget"] - 0.6
  assert after["retain"] >= before["retain"] - 0.05
  assert after["test_retain"] >= before["test_retain"] - 0.05
