"""Run directories of version 0.1.0, before the modules moved: they resume, and the report reads them."""

import json
import tarfile

import pytest

from hamu_jax import main
from hamu_jax.report import report
from hamu_jax.run import rundir

# Interrupted after the first of 40 steps of unlearning.
COMMAND = [
  "hamu_jax.main",
  "--config=configs/digits_hamu.py",
  "--config.data.train_size=200",
  "--config.data.test_size=100",
  "--config.model.name=mlp",
  "--config.train.epochs=2",
  "--config.train.evaluate_epochs=1",
  "--config.method.epochs=300",
  "--config.method.max_steps=40",
  "--config.method.batch_size=10",
  "--config.method.evaluate_epochs=1",
  "--config.method.optimizer.learning_rate=0.1",
]


@pytest.fixture
def old(golden, tmp_path):
  """The interrupted run directory, and the summary of the one that the old version finished."""
  with tarfile.open(golden / "runs" / "interrupted_0_1.tar.gz") as archive:
    archive.extractall(tmp_path, filter="data")
  return tmp_path / "interrupted", json.loads((golden / "runs" / "finished_0_1.json").read_text())


def test_an_interrupted_run_goes_on(old, small):
  workdir, expected = old
  before = rundir.read_metrics(workdir).rows
  assert main.run([*COMMAND, f"--workdir={workdir}"]) == 0
  # Nothing was computed again: the log of the old version is the start of the new one.
  assert rundir.read_metrics(workdir).rows[: len(before)] == before
  summary = rundir.read_json(workdir / "summary.json")
  assert summary["provenance"]["stages"] == expected["provenance"]["stages"]
  assert summary["stop_reason"] == expected["stop_reason"]
  # Added since.
  assert summary.keys() - {"timing"} == expected.keys()
  for model, results in expected["results"].items():
    assert summary["results"][model].keys() == results.keys()
    for split in ("retain", "forget", "test"):
      assert summary["results"][model][split] == pytest.approx(results[split], rel=1e-3, abs=1e-3)


def test_the_report_reads_it(old, small, tmp_path, capsys):
  workdir, expected = old
  assert report.run(["report", str(workdir), f"--out={tmp_path / 'without'}"]) == 0
  assert "1 runs, 1 of them unfinished" in capsys.readouterr().out
  (workdir / "summary.json").write_text(json.dumps(expected))
  assert report.run(["report", str(workdir), f"--out={tmp_path / 'report'}"]) == 0
  assert "hamu-q" in (tmp_path / "report" / "report.md").read_text()
