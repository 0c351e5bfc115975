"""The command line on a language model: one whole experiment, every method, kills, and bad input."""

import json
import os
import pathlib
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from hamu_jax import main
from hamu_jax.engine import methods
from hamu_jax.engine import step as step_lib
from hamu_jax.experiment import evaluate
from hamu_jax.models import llama, llama_config, lora, lora_weights
from hamu_jax.run.stage_cache import StageCache
from tests.arguments import replaced

ROOT = pathlib.Path(__file__).parent.parent
TARGETS = ("down_proj", "q_proj")
# The smoke experiment on fewer and shorter texts; with fewer adapted layers it compiles faster.
SMALL = [
  "hamu_jax.main",
  f"--config={ROOT / 'tests' / 'configs' / 'small_texts.py'}",
  f"--config.language.lora.targets={TARGETS}",
]
BRIEF = ["--config.evaluate.generate=False", "--config.retrain=False"]
METHODS = (
  "ft",
  "ga",
  "gdiff",
  "kl",
  "scrub",
  "gru",
  "pcgrad",
  "hamu-u",
  "npo",
  "simnpo",
  "dpo",
  "idk",
  "rmu",
  "undial",
  "wga",
  "npo_kl",
)


def summary_of(workdir):
  return json.loads((workdir / "summary.json").read_text())


def adapter_of(workdir, name="unlearned"):
  return load_file(workdir / name / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The folder of a finished experiment with hamu-q."""
  workdir = tmp_path_factory.mktemp("language") / "run"
  assert main.run([*SMALL, f"--workdir={workdir}"]) == 0
  return workdir


@pytest.fixture
def small(finished, tmp_path):
  """-> function: arguments of the same experiment in a workdir under tmp_path, on the same stages."""

  def arguments(name="run", *overrides):
    cache = f"--config.stage_cache={finished / 'stages'}"
    return replaced([*SMALL, f"--workdir={tmp_path / name}", cache], *overrides)

  return arguments


def test_one_command_runs_every_stage(finished):
  summary = summary_of(finished)
  assert summary["method"] == "hamu-q"
  assert set(summary["results"]) == {"original", "retrained", "unlearned"}
  # Eight texts to retain in batches of four.
  assert summary["steps"] == 2
  assert summary["stop_reason"] == "finished after 2 applied steps"
  for name, result in summary["results"].items():
    for split, count in (("retain", 8), ("forget", 4), ("test", 4)):
      values = result[split]
      assert set(values) == {"accuracy", "loss", "entropy", "probability", "token_probability", "count"}
      assert values["count"] == count
      assert 0 <= values["accuracy"] <= 1 and 0 < values["probability"] < 1 and values["loss"] > 0
      assert set(result["suite"][split]) == {"rouge", "probability", "truth_ratio"}
    for key in (
      "retain_forget_auc",
      "forget_test_auc",
      "forget_retain_min_k_auc",
      "test_forget_min_k_plus_plus_auc",
      "retain_forget_zlib_auc",
    ):
      assert 0 <= result[key] <= 1
    # What compares a model with the retrained one.
    assert ("forget_quality" in result["suite"]) == ("tug_of_war" in result) == (name != "retrained")
  losses = {name: result["forget"]["loss"] for name, result in summary["results"].items()}
  assert len(set(losses.values())) == 3
  assert losses["unlearned"] > losses["original"]
  assert set(summary["seconds"]) == set(summary["work"]) == {"pretrain", "retrain", "unlearn"}
  for work in summary["work"].values():
    assert work["tokens"] > 0 and 0 <= work["padding_share"] < 1 and work["tokens_per_second"] > 0
  provenance = summary["provenance"]
  assert set(provenance["stages"]) == {"pretrain", "retrain", "unlearn"}
  assert provenance["cut"] == {}
  for name in ("tradeoff.png", "alignment.png", "config.json", "metrics.jsonl", "parameters.txt", "tb"):
    assert (finished / name).exists(), name


def test_examples_are_left_to_look_at(finished):
  records = json.loads((finished / "examples" / "unlearned-suite.json").read_text())
  assert set(records) == {"retain", "forget", "test"}
  forget = records["forget"]
  assert len(forget["question"]) == len(forget["generated"]) == len(forget["truth_ratio"]) == 4
  values = summary_of(finished)["results"]["unlearned"]
  np.testing.assert_allclose(np.mean(forget["rouge_score"]), values["suite"]["forget"]["rouge"])


def test_each_model_is_left_as_an_adapter(finished):
  like = llama.abstract_params(llama.Llama(llama_config.PRESETS["tiny"]))
  cache, keys = StageCache(finished / "stages"), summary_of(finished)["provenance"]["stages"]
  for name, stage in (("original", "pretrain"), ("retrained", "retrain"), ("unlearned", "unlearn")):
    config, adapter = lora_weights.load_adapter(finished / name, like)
    assert config == lora.LoraConfig(8, 16.0, 0.05, TARGETS)
    variables = {"params": lora.unstack(adapter), "batch_stats": {}}
    trained, _ = cache.load(stage, keys[stage], variables)
    for (path, mine), theirs in zip(
      jax.tree.leaves_with_path(variables), jax.tree.leaves(trained), strict=True
    ):
      np.testing.assert_array_equal(mine, theirs, err_msg=str(path))
  moved = {
    key: np.abs(value - adapter_of(finished, "original")[key]).max()
    for key, value in adapter_of(finished).items()
  }
  assert max(moved.values()) > 0


def test_an_adapter_is_evaluated(finished, small):
  def evaluated(*arguments):
    program = ["hamu_jax.evaluate", *small("evaluation")[1:], *arguments]
    assert evaluate.run(program) == 0
    (folder,) = (each.partition("=")[2] for each in program if each.startswith("--workdir="))
    return json.loads((pathlib.Path(folder) / "evaluation.json").read_text())["results"]

  wanted = summary_of(finished)["results"]
  found = evaluated(f"--model={finished}", f"--retrained={finished}")
  assert found == {"model": wanted["unlearned"], "retrained": wanted["retrained"]}


def test_a_second_run_reuses_every_stage(finished, small, tmp_path, monkeypatch):
  monkeypatch.setattr(step_lib, "make_step", None)
  assert main.run(small()) == 0
  again, first = summary_of(tmp_path / "run"), summary_of(finished)
  assert again["results"] == first["results"]
  assert again["provenance"]["stages"] == first["provenance"]["stages"]


@pytest.mark.slow
def test_an_adapter_is_unlearned_from_in_place_of_pretraining(finished, small, tmp_path):
  arguments = small("run", f"--config.model.weights={finished / 'original'}", *BRIEF)
  assert main.run(arguments) == 0
  summary = summary_of(tmp_path / "run")
  assert set(summary["results"]) == {"original", "unlearned"}
  for key, value in adapter_of(finished).items():
    np.testing.assert_array_equal(adapter_of(tmp_path / "run")[key], value)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs(finished, small, tmp_path, name):
  # Forgetting alone, where there are two parts.
  wanted = {"layer": 1, "retain_coefficient": 0.0}
  reads = methods.METHODS[name].reads
  options = [f"--config.method.{field}={value}" for field, value in wanted.items() if field in reads]
  if name == "simnpo":
    # By itself it sees nothing to forget in texts that are as unlikely as these.
    options.append("--config.method.preference_beta=0.5")
  assert main.run(small("run", f"--config.method.name={name}", *options, *BRIEF)) == 0
  summary = summary_of(tmp_path / "run")
  assert summary["method"] == name and summary["stop_reason"].startswith("finished after")
  original, unlearned = adapter_of(finished, "original"), adapter_of(tmp_path / "run")
  for value in unlearned.values():
    assert np.isfinite(value).all()
  assert any(np.any(value != original[key]) for key, value in unlearned.items())
  if name in ("ga", "npo", "npo_kl", "wga"):
    losses = [
      results["forget"]["loss"]
      for results in (summary_of(finished)["results"]["original"], summary["results"]["unlearned"])
    ]
    assert losses[0] < losses[1]


@pytest.mark.slow
def test_devices_that_share_weights(finished, tmp_path):
  """From the texts to the evaluation, on four devices; of the rest of the file on one."""
  arguments = [
    *SMALL,
    f"--workdir={tmp_path}",
    "--config.pairing=pmap",
    "--config.mesh.weights=2",
    "--config.language.rematerialization=full",
  ]
  assert main.run(arguments) == 0
  summary, wanted = summary_of(tmp_path), summary_of(finished)
  assert summary["provenance"]["devices"] == 4
  for name, result in wanted["results"].items():
    for split in ("retain", "forget", "test"):
      for value in ("loss", "probability", "entropy"):
        np.testing.assert_allclose(summary["results"][name][split][value], result[split][value], rtol=1e-3)
  for name in ("original", "unlearned"):
    for key, value in adapter_of(finished, name).items():
      np.testing.assert_allclose(adapter_of(tmp_path, name)[key], value, atol=2e-3)


@pytest.mark.slow
def test_it_ends_the_same_if_it_is_killed(finished, small, launch, tmp_path):
  """Dropout and the order of texts included."""
  eager = ["--config.method.epochs=12", "--config.checkpoint_seconds=0", *BRIEF]
  assert main.run(small("whole", *eager)) == 0
  workdir = tmp_path / "killed"
  # Its own stages, so that it does not find what the whole run has just unlearned.
  shutil.copytree(finished / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("unlearn-*"))
  arguments = small("killed", *eager, f"--config.stage_cache={tmp_path / 'stages'}")
  # The same programs as in this process.
  process = launch(arguments, XLA_FLAGS=os.environ["XLA_FLAGS"])
  deadline = time.monotonic() + 120
  while not any(path.name.isdigit() for path in workdir.glob("checkpoints/unlearn-*/*")):
    assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
    time.sleep(0.002)
  process.kill()
  assert process.wait() == -signal.SIGKILL
  assert not (workdir / "summary.json").exists()
  assert main.run(arguments) == 0
  whole, killed = summary_of(tmp_path / "whole"), summary_of(workdir)
  assert killed["results"] == whole["results"] and killed["steps"] == whole["steps"] == 24
  for key, value in adapter_of(tmp_path / "whole").items():
    np.testing.assert_array_equal(adapter_of(workdir)[key], value, err_msg=key)


BAD_INPUT = {
  "images for a language model": (
    ["--config.data.source=digits"],
    r"config.data.source='digits': choose from .*tofu",
  ),
  "texts for an image model": (
    ["--config.model.name=resnet20"],
    r"config.data.source='authors': these are texts; set config.model.name to 'llama'",
  ),
  "a language model's method for images": (
    ["--config.model.name=resnet20", "--config.data.source=digits", "--config.method.name=npo"],
    r"config.method.name='npo': is defined for language models only; choose from ft, ga",
  ),
  "an image model's method": (
    ["--config.method.name=salun"],
    r"config.method.name='salun': is for image models",
  ),
  "unknown preset": (["--config.language.preset=huge"], r"config.language.preset='huge': choose from tiny, "),
  "no such model": (["--config.language.path=/no/such/folder"], r"/no/such/folder"),
  "shared weights of one device": (
    ["--config.mesh.weights=2"],
    r"config.mesh.weights=2.*set config.pairing to",
  ),
  "shared weights that are kept whole": (
    ["--config.mesh.weights=2", "--config.pairing=pmap"],
    r"config.mesh.weights=2: without rematerialization.*'full' or 'dots'",
  ),
  "shared weights that do not divide": (
    ["--config.mesh.weights=3", "--config.pairing=pmap", "--config.language.rematerialization=full"],
    r"config.mesh.weights=3: 2 devices of a role cannot be split",
  ),
  "no such layer": (
    ["--config.method.name=rmu"],
    r"config.method.layer=7: the model has layers 0..1; choose one",
  ),
  "an adapter wider than the model": (
    ["--config.language.lora.rank=65"],
    r"config.language.lora.rank=65: the model is 64 wide; choose at most that",
  ),
  "half precision on a CPU": (
    ["--config.language.dtype=float16"],
    r"config.language.dtype='float16': a CPU cannot multiply in it; set it to",
  ),
  "an example that is too long": (
    ["--config.text.max_length=60"],
    r"\d+ of \d+ examples are longer than config.text.max_length=60 tokens, the longest, row \d+, has",
  ),
  "rows that are too short": (
    ["--config.text.row_length=50"],
    r"config.text.row_length=50: the longest example has \d+ tokens",
  ),
  "an unknown projection": (
    ["--config.language.lora.targets=('q','k_proj')"],
    r"config.language.lora.targets='q'",
  ),
  "flash attention in 32 bits": (
    ["--config.language.attention=cudnn"],
    r"config.language.attention='cudnn': computes in 16 bits",
  ),
  "a mask": (
    ["--config.mask.fraction=0.1"],
    r"config.mask.fraction=0.1: nothing reads it here; it is read by experiments on images",
  ),
  "selection by accuracy": (
    ["--config.train.select=best"],
    r"config.train.select='best': is for image models",
  ),
  "no such split": (["--config.text.forget_split=forgot"], r"config.text.forget_split.*forgot"),
  "more texts than there are": (["--config.text.forget_size=100000"], r"config.text.forget_size=100000"),
  "an empty refusal": (
    ["--config.text.refusals=('No.',' ')", "--config.method.name=dpo"],
    r"config.text.refusals",
  ),
  "an unknown template": (["--config.text.template=alpaca"], r"config.text.template='alpaca'"),
  "no adapter": (["--config.model.weights=/no/such"], r"/no/such"),
  "another adapter": (["--config.language.lora.rank=4"], r"the adapter has r=8, alpha=16"),
  "a watermark of nobody's": (
    ["--config.evaluate.watermark_tokenizer=gpt2"],
    r"config.evaluate.watermark_tokenizer",
  ),
}


@pytest.mark.parametrize(("overrides", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line_and_status_2(small, finished, tmp_path, capsys, overrides, message):
  if "rank" in overrides[0]:
    overrides = [*overrides, f"--config.model.weights={finished / 'original'}"]
  capsys.readouterr()
  assert main.run(small("run", *overrides)) == 2
  *header, error = capsys.readouterr().err.strip().splitlines()
  # What depends on the encoded examples is found when the run has said what it is about to do.
  assert error.startswith("error: ") and len(header) in (0, 3)
  assert re.search(message, error), error
  assert not (tmp_path / "run" / "metrics.jsonl").exists()
