"""Times the unlearning of a sweep's members, trained in one program against one after the other.

  python benchmarks/together.py
  python benchmarks/together.py --members=4 --model=mlp

Both train the same members in this process: HAMU on the embedded digits with several constraint ratios, from
one pretrained model. The seconds are those of the unlearning stages: compilation, steps, and their
evaluations. One after the other, each member compiles its own program, as separate runs do.
"""

import argparse
import json
import pathlib
import shutil
import tempfile

from hamu_jax.config.command_line import parse
from hamu_jax.experiment import experiment, together
from hamu_jax.run import preemption


def configs(args, folder: pathlib.Path):
  """Yields (workdir, configuration) of each member."""
  for k in range(args.members):
    ratio = 0.1 * (k + 1) / args.members
    workdir = folder / f"{ratio:.4f}"
    yield (
      workdir,
      parse(
        [
          "together",
          "--config=configs/digits_hamu.py",
          f"--config.model.name={args.model}",
          f"--config.method.constraint_ratio={ratio}",
          f"--config.method.epochs={args.epochs}",
          f"--config.stage_cache={folder / 'stages'}",
          f"--config.train.epochs={args.train_epochs}",
        ]
      ).config,
    )


def seconds_of(workdirs) -> list[float]:
  return [json.loads((workdir / "summary.json").read_text())["seconds"]["unlearn"] for workdir in workdirs]


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--members", type=int, default=8)
  parser.add_argument("--model", default="resnet20")
  parser.add_argument("--epochs", type=float, default=4.0, help="epochs of unlearning")
  parser.add_argument("--train-epochs", type=int, default=2, help="epochs of training, which is not timed")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder, preemption.Watch() as watch:
    one, all_at_once = pathlib.Path(folder, "one"), pathlib.Path(folder, "together")
    members = list(configs(args, one))
    for workdir, config in members:
      experiment.Experiment(config, workdir, watch).run()
    alone = seconds_of(workdir for workdir, _ in members)
    # The shared stages are copied, but not those of unlearning.
    shutil.copytree(one / "stages", all_at_once / "stages", ignore=shutil.ignore_patterns("unlearn-*"))
    members = list(configs(args, all_at_once))
    together.run_members([(config, workdir) for workdir, config in members], watch)
    joint = sum(seconds_of(workdir for workdir, _ in members))
  print(f"\n{args.members} members, {args.model}, {args.epochs:g} epochs")
  print(f"one after the other  {sum(alone):8.2f} s")
  print(f"together             {joint:8.2f} s")
  print(f"ratio                {joint / sum(alone):8.3f}")


if __name__ == "__main__":
  main()
