"""Reports, before any step, how hard a forget set is, which constraint is feasible and what a step costs.

  python -m hamu_jax.analysis.hardness --config=configs/digits_hamu.py --workdir=runs/digits
  python -m hamu_jax.analysis.hardness --config=configs/tofu_smollm2_hamu.py:smoke --batches=4

Takes the original model from the experiment's cache, or pretrains it and puts it there for
`python -m hamu_jax.main` with the same --workdir (the default is the same, too). On the first --batches batch
pairs (default 8) it computes the gradients of both losses, HAMU's step on each tensor, and the first step of
the configured method, hamu-q, hamu-u, gdiff and ga. For each step it compares the predicted first-order
change of the losses with the actual change. The model is not changed. Writes to the workdir

    hardness.json            every number
    hardness.png, .pdf       angles, feasible constraints and first steps

and prints the tables and a verdict. `--config.FIELD=VALUE` works as in `hamu_jax.main`.
"""

import argparse
import collections
import functools
import pathlib
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from hamu_jax.run import preemption

if __name__ == "__main__":
  # The other imports take seconds.
  preemption.leave_on_signals()

import jax
import ml_collections
import numpy as np
import optax

from hamu_jax.analysis import forecast, hardness_plots, preview
from hamu_jax.analysis.hardness_text import tables, verdict
from hamu_jax.config import command_line as config_command_line
from hamu_jax.config import validation
from hamu_jax.config.kinds import in_range
from hamu_jax.engine import methods
from hamu_jax.errors import UserError
from hamu_jax.paired import Paired
from hamu_jax.run import command_line, progress, rundir
from hamu_jax.transforms import BRANCHES

# Methods whose first steps are shown besides that of the configured method.
COMPARED = ("hamu-q", "hamu-u", "gdiff", "ga")
# A gradient whose norm is at most this share of the plain loss's counts as zero.
_NEGLIGIBLE = 1e-4
# Arguments of `forecast.hardness` with the names of their configuration fields.
_OPTIONS = ("radius", "share", "normalize_share", "on_infeasible", "criterion")


def analyse(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  batches: int = 8,
  watch: preemption.Watch | None = None,
) -> dict[str, Any]:
  """Analyses an experiment's first steps without taking them.

  Args:
    config: validated configuration.
    workdir: folder of the run. Its original model is read from there or from `config.stage_cache`, and
      written there after pretraining.
    batches: number of batch pairs to analyse, at most those of an epoch.
    watch: watch that notices signals; None ignores them.

  Returns:
    The content of hardness.json. Over the pairs, a number is {"first", "mean", "std"}, a bool
    {"first", "share"} and a name {"first", "counts"}. None is a number that is infinite or undefined.

  Raises:
    UserError: if the experiment cannot run, or has several processes.
    preemption.Preempted: if it was asked to end; pretraining can be resumed.
  """
  if config.distributed.num_processes != 1 or config.distributed.coordinator:
    raise UserError(
      f"config.distributed.num_processes={config.distributed.num_processes}: the preview runs in one process;"
      " set it to 1 and config.distributed.coordinator to ''"
    )
  watch = watch or preemption.Watch()
  _make_folder(workdir)
  look = preview.Preview(config, workdir, watch)
  names = [name for name in dict.fromkeys((config.method.name, *COMPARED)) if look.takes(name)]
  options = _options(config)
  count = min(batches, look.most_pairs)
  values = _values(look, count, names, options, watch)
  report = {
    "method": config.method.name,
    "pairs": count,
    "weights": sum(look.sizes),
    "options": options,
    "losses": values["losses"],
    "gradients": values["gradients"],
    "limits": _limits(values[options["scope"]]),
    "whole": {field: of_K[:, 0] for field, of_K in values["global"].items() if of_K.ndim == 2},
    "blocks": [
      {"name": name, "weights": size}
      | {field: of_KxT[:, t] for field, of_KxT in values["tensor"].items() if of_KxT.ndim == 2}
      for t, (name, size) in enumerate(zip(look.names, look.sizes, strict=True))
    ],
    # JAX sorts the keys of a dict, so the order of the methods is restored.
    "steps": {name: values["steps"][name] for name in names},
  }
  report = _reported(report)
  report["notes"] = _notes(config, look, report, batches)
  report["verdict"] = verdict(report)
  return report


def _options(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The constraint and its options, by the names of the configuration; for other methods, hamu-q's."""
  options = config.method
  rate, constraint = options.optimizer.learning_rate, options.constraint
  return {
    "learning_rate": rate,
    "optimizer": options.optimizer.name,
    "constraint": options.constraint_ratio * rate if constraint is None else constraint,
    # `preview` refuses a rate of 0.
    "constraint_ratio": options.constraint_ratio if constraint is None else constraint / (rate or 1),
    "is_absolute": constraint is not None,
    "variant": "hamu-u" if options.name == "hamu-u" else "hamu-q",
    "scope": options.scope,
    "stop_on_criterion": options.stop_on_criterion,
    **{name: options[name] for name in _OPTIONS},
  }


def _values(look: preview.Preview, count: int, names: Sequence[str], options, watch) -> dict[str, Any]:
  """All numbers of the first batch pairs, as arrays whose first axis has `count` pairs."""
  measures = {
    scope: jax.jit(
      functools.partial(
        forecast.hardness,
        scope=scope,
        learning_rate=options["learning_rate"],
        constraint=options["constraint"],
        variant=options["variant"],
        **{name: options[name] for name in _OPTIONS},
      )
    )
    for scope in ("tensor", "global")
  }
  seen = []
  with progress.Progress("batch pairs", count) as bar:
    for number in range(count):
      if watch.requested:
        raise preemption.Preempted
      seen.append(_look_at(look, look.pair(number), names, measures))
      bar.update(number + 1)
  return jax.tree.map(lambda *arrays: np.stack(arrays), *seen)


def _look_at(look: preview.Preview, pair: preview.Pair, names: Sequence[str], measures) -> dict[str, Any]:
  """All numbers of one batch pair, as arrays."""
  found: dict[str, Any] = {
    scope: jax.device_get(measure(*pair.seen))._asdict() for scope, measure in measures.items()
  }
  for blocks in found.values():
    blocks["branch"] = np.array(BRANCHES)[blocks["branch"]]
  plain, seen = (
    Paired(*(np.asarray(optax.tree.norm(gradient)) for gradient in gradients))
    for gradients in (pair.gradients, pair.seen)
  )
  steps: dict[str, dict[str, Any]] = {}
  for name in names:
    step = look.step(name, pair)
    after = look.losses(pair, step.update)
    changes = Paired(*(np.asarray(forecast.first_order_change(g, step.update)) for g in pair.gradients))
    steps[name] = {
      "stop": np.array(step.stop.name.lower()),
      "length": np.asarray(optax.tree.norm(step.update)),
    }
    for role, change_T in changes._asdict().items():
      norm = getattr(step.norms, role)
      steps[name][role] = {
        "predicted": change_T.sum(),
        "happened": np.asarray(getattr(after, role) - getattr(pair.losses, role)),
        "is_zero": np.asarray(norm is not None and norm <= _NEGLIGIBLE * getattr(seen, role)),
      }
      if name == names[0]:
        found["tensor"][f"{role}_change"] = change_T
        found["global"][f"{role}_change"] = change_T.sum()[None]
  return found | {
    "losses": {role: np.asarray(loss) for role, loss in pair.losses._asdict().items()},
    "gradients": {
      role: {"norm": getattr(plain, role), "seen": getattr(seen, role)} for role in Paired._fields
    },
    "steps": steps,
  }


def _limits(blocks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The limits over all blocks, for each pair."""
  return {
    "feasible_ratio": blocks["feasible_ratio"].min(1),
    "free_ratio": blocks["free_ratio"].min(1),
    "infeasible": blocks["infeasible"].sum(1).astype(float),
    "losing": (blocks["progress"] < 0).sum(1).astype(float),
    "stopping_ratio": blocks["stopping_ratio"],
  }


def _reported(value: Any) -> Any:
  """The JSON form of nested values; the first axis of an array is that of the pairs."""
  if isinstance(value, Mapping):
    return {name: _reported(item) for name, item in value.items()}
  if isinstance(value, list):
    return [_reported(item) for item in value]
  return rundir.jsonable(_spread(value) if isinstance(value, np.ndarray) else value)


def _spread(values_K: np.ndarray) -> dict[str, Any]:
  """The summary of one value over the pairs."""
  first = values_K[0].item()
  if values_K.dtype.kind == "U":
    return {"first": first, "counts": dict(collections.Counter(values_K.tolist()))}
  if values_K.dtype.kind == "b":
    return {"first": first, "share": float(values_K.mean())}
  has_spread = len(values_K) > 1 and np.isfinite(values_K).all()
  return {
    "first": first,
    "mean": float(values_K.mean()),
    "std": float(values_K.std(ddof=1)) if has_spread else None,
  }


def _notes(config, look: preview.Preview, report: Mapping[str, Any], batches: int) -> list[str]:
  """Notes about limits of the numbers."""
  name, method = config.method.name, methods.METHODS[config.method.name]
  notes = []
  if not method.unlearns:
    notes.append(
      f"{name} only trains and takes no step from this one; only the steps of other methods are shown"
    )
  elif len(method.substeps) > 1:
    notes.append(
      f"a step of {name} is several updates, each of which changes the gradients of the next; it is not shown"
    )
  elif method.layout != "paired":
    notes.append(f"{name} reads one stream of both sets, not batch pairs; its step is not shown")
  elif len(method.roles) == 1:
    (role,) = method.roles
    notes.append(f"{name} reads only {role} batches; the pairs are those of hamu-q")
    if not look.takes(name):
      notes.append(f"with config.sam.rho above 0, the step of {name} is not shown")
  if look.warms_up:
    notes.append("the rate of the first step is 0 (warm-up); steps are shown at the peak rate")
  if report["pairs"] < batches:
    notes.append(f"--batches={batches}: an epoch has {report['pairs']} pairs")
  for role in Paired._fields:
    if name in report["steps"] and report["steps"][name][role]["is_zero"]["first"]:
      notes.append(
        f"the {role} gradient of {name} is zero, because its loss is the distance to the original model; "
        "its first step follows the other role's gradient alone"
      )
  options, losses = config.method, report["losses"]
  if options.stop_on_loss:
    if losses["retain"]["first"] > options.max_retain_loss:
      notes.append("the retain loss is above config.method.max_retain_loss: the run would stop at once")
    if losses["forget"]["first"] < options.min_forget_loss:
      notes.append("the forget loss is below config.method.min_forget_loss: the run would stop at once")
  return notes


def _make_folder(path: pathlib.Path) -> None:
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--workdir={path}: {error.strerror or error}; choose another folder") from error


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Any, pathlib.Path]:
  """Returns this program's own options, the configuration and the workdir."""
  parser = command_line.Parser(add_help=False)
  parser.add_argument("--batches", type=int, default=8)
  options, rest = parser.parse_known_args(arguments[1:])
  in_range("--batches", options.batches, 1)
  values = config_command_line.parse([arguments[0], *rest])
  validation.validate(values.config, values.given)
  return options, values.config, config_command_line.workdir_of(values)


def _run(arguments: Sequence[str]) -> None:
  options, config, workdir = _parse(arguments)
  with preemption.Watch() as watch:
    report = analyse(config, workdir, batches=options.batches, watch=watch)
  rundir.write_json(workdir / "hardness.json", report)
  hardness_plots.draw(report, workdir / "hardness")
  print(tables(report), *(f"note: {note}" for note in report["notes"]), sep="\n")
  print(f"\n{textwrap.fill(report['verdict'], 110)}")
  print(f"everything is in {workdir}/hardness.json, .png and .pdf")


def run(arguments: Sequence[str]) -> int:
  """Parses a command line and runs the analysis.

  Args:
    arguments: command line in the form of `sys.argv`, the program's name first.

  Returns:
    The exit status: 0, or 2 for bad input. If it was interrupted, the process ends with 143.
  """
  return command_line.run(lambda: _run(arguments), arguments, lambda: __doc__)


if __name__ == "__main__":
  sys.exit(run(sys.argv))
