"""Times an ensemble trained in one program against its models one by one, and measures its scores' stability.

  python benchmarks/memorization.py --models=16 --out=runs/memorization

The first figure is the wall time of K models of `configs/digits_sharp.py`, one after the other in this
process, divided by that of the same models in one vmapped program. Both include one compilation, which
matters less the more `--epochs` there are. The second figure is the rank correlation of the scores of two
disjoint halves of an ensemble of four times `--models`.
"""

import argparse
import pathlib
import runpy
import shutil
import time

import numpy as np
import scipy.stats

from hamu_jax.config import validation
from hamu_jax.experiment import experiment
from hamu_jax.run import preemption
from sam_jax import memorization


def make(args, name, **options):
  """Returns an experiment that can estimate scores, in an empty folder."""
  folder = pathlib.Path(args.out) / name
  shutil.rmtree(folder, ignore_errors=True)
  get_config = runpy.run_path(args.config)["get_config"]
  config = get_config()
  config.memorization.update(**options, **({"epochs": args.epochs} if args.epochs else {}))
  if args.model:
    config.model.name = args.model
  validation.validate(config)
  return experiment.Experiment(config, folder, preemption.Watch())


def timed(args, name, **options):
  """Returns the seconds of one estimation."""
  runner = make(args, name, **options)
  began = time.perf_counter()
  runner.stages.estimate_memorization()
  return time.perf_counter() - began


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/digits_sharp.py")
  parser.add_argument("--model", default="", help="another model than the configuration's")
  parser.add_argument("--models", type=int, default=16)
  parser.add_argument("--epochs", type=float, default=0.0, help="0 takes the configuration's")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--out", default="runs/memorization", help="folder of the runs")
  args = parser.parse_args()

  ratios = []
  for number in range(args.rounds):
    together = timed(args, f"together{number}", models=args.models, parallel=args.models)
    apart = timed(args, f"apart{number}", models=args.models, parallel=1)
    ratios.append(apart / together)
    print(f"{args.models} models: together {together:.1f} s, one by one {apart:.1f} s", flush=True)
  print(f"one by one over together: {np.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")

  runner = make(args, "halves", models=4 * args.models, parallel=args.models)
  whole, correct, included, _ = runner.stages.estimate_memorization()
  halves = [memorization.memorization_scores(correct[part::2], included[part::2]) for part in range(2)]
  correlation = scipy.stats.spearmanr(*halves).statistic
  print(
    f"{4 * args.models} models: rank correlation of two halves {correlation:.3f}; "
    f"{np.mean(whole > 0.1):.1%} of {whole.size} examples above 0.1, {np.mean(whole > 0.5):.1%} above 0.5"
  )


if __name__ == "__main__":
  main()
