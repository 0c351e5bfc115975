"""How hard a forget set is, which constraint is feasible, what a first step costs: before any is taken.

  python -m hamu_jax.analysis.hardness --config=configs/digits_hamu.py --workdir=runs/digits
  python -m hamu_jax.analysis.hardness --config=configs/tofu_smollm2_hamu.py:smoke --batches=4

Takes the original model from the experiment's cache, or pretrains it and leaves it there for
`python -m hamu_jax.main` with the same --workdir (default: as there). On the first --batches batch pairs
(default 8) it computes the gradients of both losses, what HAMU would do with them in each tensor, and the
first step of the configured method, of hamu-q, hamu-u, gdiff and ga: what it should change to first order,
and what it does change. No model is changed. Writes to the workdir

    hardness.json            every number
    hardness.png, .pdf       angles, feasible constraints and first steps

and prints the tables and a verdict. `--config.FIELD=VALUE` is as in `hamu_jax.main`.
"""

import argparse
import collections
import functools
import pathlib
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from hamu_jax.analysis import forecast, hardness_plots, preview
from hamu_jax.config import command_line as config_command_line
from hamu_jax.config import validation
from hamu_jax.config.kinds import in_range
from hamu_jax.engine import methods
from hamu_jax.errors import UserError
from hamu_jax.paired import Paired
from hamu_jax.run import command_line, preemption, progress, rundir
from hamu_jax.run.tables import format_table
from hamu_jax.transforms import BRANCHES

# What the first step of any method is set against.
COMPARED = ("hamu-q", "hamu-u", "gdiff", "ga")
_ROWS = 24
_UNBOUNDED = "any"
# Share of a loss's gradient that is rounding, and of a prediction by which it misses.
_NEGLIGIBLE, _MISSED = 1e-4, 0.25
# Of `forecast.hardness`, by the names of the configuration.
_OPTIONS = ("radius", "share", "normalize_share", "on_infeasible", "criterion")


def analyse(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  batches: int = 8,
  watch: preemption.Watch | None = None,
) -> dict[str, Any]:
  """Looks at an experiment's first steps without taking them.

  Args:
    config: validated configuration.
    workdir: of the run; its original model is looked up and left there, or in `config.stage_cache`.
    batches: pairs to look at, at most those of an epoch.
    watch: notices signals; None leaves them alone.

  Returns:
    The content of hardness.json. A number over the pairs is {"first", "mean", "std"}, a truth
    {"first", "share"}, a name {"first", "counts"}; None is a number that is infinite or undefined.

  Raises:
    UserError: the experiment cannot run, or is one of several processes.
    preemption.Preempted: it was asked to end; a pretraining can go on from there.
  """
  if config.distributed.num_processes != 1 or config.distributed.coordinator:
    raise UserError(
      f"config.distributed.num_processes={config.distributed.num_processes}: the preview is one process; "
      "set it to 1 and config.distributed.coordinator to ''"
    )
  watch = watch or preemption.Watch()
  _make_folder(workdir)
  look = preview.Preview(config, workdir, watch)
  names = [name for name in dict.fromkeys((config.method.name, *COMPARED)) if look.takes(name)]
  options = _options(config)
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
  count = min(batches, look.most_pairs)
  seen = []
  with progress.Progress("batch pairs", count) as bar:
    for number in range(count):
      if watch.requested:
        raise preemption.Preempted
      seen.append(_look_at(look, look.pair(number), names, measures))
      bar.update(number + 1)
  values = jax.tree.map(lambda *arrays: np.stack(arrays), *seen)
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
    # JAX sorts what it maps over.
    "steps": {name: values["steps"][name] for name in names},
  }
  report = _reported(report)
  report["notes"] = _notes(config, look, report, batches)
  report["verdict"] = verdict(report)
  return report


def _options(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What the constraint is, by the names of the configuration; that of hamu-q for other methods."""
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


def _look_at(look: preview.Preview, pair: preview.Pair, names: Sequence[str], measures) -> dict[str, Any]:
  """All numbers of one batch pair, as arrays."""
  found = {scope: jax.device_get(measure(*pair.seen))._asdict() for scope, measure in measures.items()}
  for blocks in found.values():
    blocks["branch"] = np.array(BRANCHES)[blocks["branch"]]
  plain, seen = (
    Paired(*(np.asarray(optax.tree.norm(gradient)) for gradient in gradients))
    for gradients in (pair.gradients, pair.seen)
  )
  steps = {}
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
  """What all blocks allow together, of each pair."""
  return {
    "feasible_ratio": blocks["feasible_ratio"].min(1),
    "free_ratio": blocks["free_ratio"].min(1),
    "infeasible": blocks["infeasible"].sum(1).astype(float),
    "losing": (blocks["progress"] < 0).sum(1).astype(float),
    "stopping_ratio": blocks["stopping_ratio"],
  }


def _reported(value: Any) -> Any:
  """The JSON form of nested values, in which arrays are values of each pair."""
  if isinstance(value, Mapping):
    return {name: _reported(item) for name, item in value.items()}
  if isinstance(value, list):
    return [_reported(item) for item in value]
  return rundir.jsonable(_spread(value) if isinstance(value, np.ndarray) else value)


def _spread(values_K: np.ndarray) -> dict[str, Any]:
  """What is reported of one value of each pair."""
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
  """What the numbers do not say, or not of the very first step."""
  name, method = config.method.name, methods.METHODS[config.method.name]
  notes = []
  if method.from_scratch:
    notes.append(f"{name} trains a new model and takes no step from this one; only others' steps are shown")
  elif len(method.substeps) > 1:
    notes.append(
      f"a step of {name} is several updates, each of which changes the gradients of the next; it is not shown"
    )
  elif method.layout != "paired":
    notes.append(f"{name} reads one stream of both sets, not batch pairs; its step is not shown")
  elif len(method.roles) == 1:
    (role,) = method.roles
    notes.append(f"{name} reads {role} batches alone; the pairs are those of hamu-q")
    if not look.takes(name):
      notes.append(f"with config.sam.rho above 0, the step of {name} is not shown")
  if look.warms_up:
    notes.append("the rate of the first step is 0 (warm-up); steps are shown at the peak rate")
  if report["pairs"] < batches:
    notes.append(f"--batches={batches}: an epoch has {report['pairs']} pairs")
  for role in Paired._fields:
    if name in report["steps"] and report["steps"][name][role]["is_zero"]["first"]:
      notes.append(
        f"the {role} gradient of {name} is zero at the original model, against which it is "
        "measured; its first step is the other role's"
      )
  options, losses = config.method, report["losses"]
  if options.stop_on_loss:
    if losses["retain"]["first"] > options.max_retain_loss:
      notes.append("the retain loss is above config.method.max_retain_loss: the run would stop at once")
    if losses["forget"]["first"] < options.min_forget_loss:
      notes.append("the forget loss is below config.method.min_forget_loss: the run would stop at once")
  return notes


def verdict(report: Mapping[str, Any]) -> str:
  """One paragraph in plain words.

  Args:
    report: what `analyse` returns.
  """
  sentences = [_of_angles(report), _of_constraint(report), _of_price(report), _of_step(report)]
  return " ".join(sentence for sentence in sentences if sentence)


def _of_angles(report) -> str:
  def share(chosen):
    return sum(block["weights"] for block in report["blocks"] if chosen(block)) / report["weights"]

  hard = share(lambda block: block["angle"]["mean"] < forecast.HARD)
  easy = share(lambda block: block["angle"]["mean"] >= forecast.EASY)
  word = "hard" if hard >= 0.5 else "easy" if easy >= 0.5 else "moderate"
  return (
    f"{word}: {100 * hard:.0f} % of the weights lie in blocks with an angle under {forecast.HARD} degrees, "
    f"{100 * easy:.0f} % in blocks of {forecast.EASY} or more; the gradients of the whole model are "
    f"{_with_spread(report['whole']['angle'], '.0f')} degrees apart."
  )


def _of_constraint(report) -> str:
  options, limits = report["options"], report["limits"]
  unit = options["learning_rate"] if options["is_absolute"] else 1.0
  field = "constraint" if options["is_absolute"] else "constraint_ratio"
  asked = f"{options['constraint' if options['is_absolute'] else 'constraint_ratio']:.3g}"
  most = _with_spread(limits["feasible_ratio"], ".3g", unit)
  failing = int(limits["infeasible"]["first"])
  method, remedy = options["variant"], f"lower config.method.{field} to that"
  if options["scope"] == "global":
    text = f"The {field} {asked} is {'not ' * bool(failing)}feasible; the largest that is: {most}."
  else:
    count = len(report["blocks"])
    text = (
      f"The {field} {asked} is feasible in {count - failing} of {count} blocks; the largest feasible "
      f"everywhere: {most}."
    )
  if not failing:
    return text
  first, second = _roles(method)
  consequence = {
    "stop": f"{method} would stop before its first step: {remedy}, or set "
    "config.method.on_infeasible=project.",
    "project": f"Where it is not, {method} goes as far for the {second} loss as the radius allows, "
    f"whatever the {first} loss does (on_infeasible=project); to weigh both, {remedy}.",
    "exceed": f"Where it is not, the step of {method} is longer than the radius (on_infeasible=exceed); to "
    f"stay within it, {remedy}.",
  }
  return f"{text} {consequence[options['on_infeasible']]}"


def _of_price(report) -> str:
  options, limits = report["options"], report["limits"]
  first, _ = _roles(options["variant"])
  worse = {"retain": "rise", "forget": "fall"}[first]
  unit = options["learning_rate"] if options["is_absolute"] else 1.0
  free = _with_spread(limits["free_ratio"], ".3g", unit)
  text = f"Up to {free} the {first} loss need not {worse} in any block"
  losing = int(limits["losing"]["first"])
  if losing and not limits["infeasible"]["first"]:
    text += f"; what is asked makes it {worse} in {losing}"
  text += "."
  asked, stopping = options["constraint_ratio"], limits["stopping_ratio"]["first"]
  if stopping is not None and asked > stopping:
    text += (
      f" HAMU's aggregate criterion is met above {stopping * unit:.3g}, so at once"
      f"{', and would stop the run' if options['stop_on_criterion'] else ''}."
    )
  return text


def _of_step(report) -> str:
  name = next(iter(report["steps"]))
  step = report["steps"][name]
  if step["stop"]["first"] != "none":
    return ""

  def changes(kind):
    retain, forget = (step[role][kind]["first"] for role in Paired._fields)
    return f"the retain loss by {retain:+.2g} and the forget loss by {forget:+.2g}"

  text = (
    f"The first step of {name} should change {changes('predicted')} nats; taken, it changes "
    f"{changes('happened')}."
  )
  missed = [
    role
    for role in Paired._fields
    if abs(step[role]["happened"]["first"] - step[role]["predicted"]["first"])
    > _MISSED * abs(step[role]["predicted"]["first"])
  ]
  if missed:
    text += (
      f" For the {' and the '.join(missed)} loss first order does not hold at this length; "
      "a lower config.method.optimizer.learning_rate keeps closer to it."
    )
  return text


def _roles(variant: str) -> tuple[str, str]:
  """Whose loss a variant optimises, and whose it constrains."""
  return ("forget", "retain") if variant == "hamu-u" else ("retain", "forget")


def tables(report: Mapping[str, Any]) -> str:
  """The blocks and the steps as aligned text.

  Of many blocks those are shown whose gradients have the largest product of norms, in the model's order.

  Args:
    report: what `analyse` returns.
  """
  return f"{_block_table(report)}\n\n{_step_table(report)}"


def _block_table(report) -> str:
  blocks = report["blocks"]

  def product(t):
    return blocks[t]["retain_norm"]["first"] * blocks[t]["forget_norm"]["first"]

  shown = sorted(sorted(range(len(blocks)), key=product, reverse=True)[:_ROWS])
  names = hardness_plots.short_names([block["name"] for block in blocks])
  first, _ = _roles(report["options"]["variant"])
  header = (
    "block",
    "weights",
    "angle",
    "mean",
    "|g_r|",
    "|g_f|",
    "f/r",
    "feasible",
    "free",
    "branch",
    "a",
    "b",
    f"{first} %",
    "d retain",
    "d forget",
  )

  def row(name, weights, block, *, has_constraint):
    angle = block["angle"]
    retain, forget = block["retain_norm"]["first"], block["forget_norm"]["first"]
    cells = [
      name,
      f"{weights:,}",
      f"{angle['first']:.0f}",
      _with_spread(angle, ".0f", first=False),
      f"{retain:.3g}",
      f"{forget:.3g}",
      f"{forget / retain:.3g}" if retain else "-",
    ]
    if has_constraint:
      cells += [
        _cell(block["feasible_ratio"]["first"]),
        _cell(block["free_ratio"]["first"]),
        block["branch"]["first"],
        *(f"{block[f'{role}_weight']['first'] + 0:.2f}" for role in Paired._fields),
        f"{100 * block['progress']['first']:.0f}",
      ]
    else:
      cells += ["-"] * 6
    return [*cells, *(f"{block[f'{role}_change']['first']:+.1e}" for role in Paired._fields)]

  by_tensor = report["options"]["scope"] == "tensor"
  rows = [row(names[t], blocks[t]["weights"], blocks[t], has_constraint=by_tensor) for t in shown]
  if len(blocks) > len(shown):
    rows.append([f"and {len(blocks) - len(shown)} more", *[""] * (len(header) - 1)])
  rows.append(row("whole model", report["weights"], report["whole"], has_constraint=True))
  return format_table(header, rows)


def _step_table(report) -> str:
  header = ("first step", "length", "retain loss", "happened", "forget loss", "happened", "")
  rows = []
  for name, step in report["steps"].items():
    of_pairs = [step[role][kind] for role in Paired._fields for kind in ("predicted", "happened")]
    stop = step["stop"]["first"]
    rows.append(
      [
        name,
        f"{step['length']['first']:.3g}",
        *(f"{value['first']:+.3g}" for value in of_pairs),
        "" if stop == "none" else f"stops: {stop}",
      ]
    )
    if report["pairs"] > 1:
      stopped = report["pairs"] - step["stop"]["counts"].get("none", 0)
      rows.append(
        [
          f"  mean of {report['pairs']}",
          _with_spread(step["length"], ".2g", first=False),
          *(_with_spread(value, "+.2g", first=False) for value in of_pairs),
          f"{stopped} of {report['pairs']} stop" if stopped else "",
        ]
      )
  return format_table(header, rows)


def _with_spread(value: Mapping[str, float], form: str, unit: float = 1.0, *, first: bool = True) -> str:
  """A value of the first pair with the mean and spread of all, or these alone."""
  if value["first"] is None:
    return _UNBOUNDED
  if value["std"] is None:
    return f"{unit * value['first']:{form}}"
  plain = form.replace("+", "")
  spread = f"{unit * value['mean']:{form}} ± {unit * value['std']:{plain}}"
  return f"{unit * value['first']:{form}} ({spread})" if first else spread


def _cell(ratio: float | None) -> str:
  return _UNBOUNDED if ratio is None else f"{ratio:.3g}"


def _make_folder(path: pathlib.Path) -> None:
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--workdir={path}: {error.strerror or error}; choose another folder") from error


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Any, pathlib.Path]:
  """-> this program's own options, the configuration, the workdir."""
  parser = command_line.Parser(add_help=False)
  parser.add_argument("--batches", type=int, default=8)
  options, rest = parser.parse_known_args(arguments[1:])
  in_range("--batches", options.batches, 1)
  values = config_command_line.parse([arguments[0], *rest])
  validation.validate(values.config)
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
  """Parses a command line and looks.

  Args:
    arguments: as `sys.argv`, the program's name first.

  Returns:
    The exit status: 0, or 2 for bad input. If it was interrupted, the process ends with 143.
  """
  if {"--help", "-h"} & set(arguments):
    print(__doc__)
    return 0
  return command_line.run(lambda: _run(arguments))


if __name__ == "__main__":
  sys.exit(run(sys.argv))
