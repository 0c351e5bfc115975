"""Reads a run directory.

python docs/examples/read_results.py runs/digits
"""

import pathlib
import sys

import numpy as np
import safetensors.numpy

from hamu_jax.report import gather
from hamu_jax.run import rundir


# --8<-- [start:one]
def read_run(path):
  """Numbers of one run: results by model, and the forget loss by step of unlearning."""
  path = pathlib.Path(path)
  summary = rundir.read_json(path / "summary.json")
  accuracies = {
    model: {split: result[split]["accuracy"] for split in ("retain", "forget", "test")}
    for model, result in summary["results"].items()
  }
  steps = [
    row for row in rundir.read_metrics(path).rows if row["stage"] == "unlearn" and row["split"] == "step"
  ]
  forget_loss = np.array([row["forget_loss"] for row in steps])
  return summary, accuracies, forget_loss


def read_weights(path):
  """The unlearned model's tensors by their PyTorch names, and the indices of the forgotten examples."""
  path = pathlib.Path(path)
  tensors = safetensors.numpy.load_file(path / "unlearned.safetensors")
  with np.load(path / "split.npz", allow_pickle=False) as split:
    forgotten = split["forget"]
  return tensors, forgotten


# --8<-- [end:one]


# --8<-- [start:many]
def read_many(*paths):
  """Means over seeds of the test accuracy, by what tells the runs apart."""
  means = []
  for study in gather.studies(gather.gather(paths).runs):
    for group in study.groups:
      means.append((group.settings, group.columns["test.accuracy"]))
  return means


# --8<-- [end:many]


def main(path):
  """Prints some of it."""
  summary, accuracies, forget_loss = read_run(path)
  print(summary["method"], summary["stop_reason"])
  print(accuracies["unlearned"])
  print(f"forget loss {forget_loss[0]:.3f} -> {forget_loss[-1]:.3f}")
  tensors, forgotten = read_weights(path)
  print(f"{len(tensors)} tensors, {len(forgotten)} examples forgotten")
  for settings, accuracy in read_many(path):
    print(settings, f"test accuracy {accuracy.mean:.4f} of {accuracy.count} run(s)")


if __name__ == "__main__":
  main(sys.argv[1])
