"""Hardness in words: the verdict and the tables of a report of `hamu_jax.analysis.hardness.analyse`."""

from collections.abc import Mapping
from typing import Any

from hamu_jax.analysis import forecast, hardness_plots
from hamu_jax.paired import Paired
from hamu_jax.run.tables import format_table

_ROWS = 24
_UNBOUNDED = "any"
# Relative error above which a prediction counts as wrong.
_MISSED = 0.25


def verdict(report: Mapping[str, Any]) -> str:
  """One paragraph in plain words.

  Args:
    report: report of `analyse`.
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
    text = f"The {field} {asked} is {'not ' * bool(failing)}feasible; the largest feasible one is {most}."
  else:
    count = len(report["blocks"])
    text = (
      f"The {field} {asked} is feasible in {count - failing} of {count} blocks; the largest that is feasible "
      f"in all blocks is {most}."
    )
  if not failing:
    return text
  first, second = _roles(method)
  consequence = {
    "stop": f"{method} would stop before its first step: {remedy}, or set "
    "config.method.on_infeasible=project.",
    "project": f"In the other blocks, {method} goes as far for the {second} loss as the radius allows, "
    f"whatever the {first} loss does (on_infeasible=project); to weigh both, {remedy}.",
    "exceed": f"In the other blocks, the step of {method} is longer than the radius (on_infeasible=exceed); "
    f"to stay within it, {remedy}.",
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
    text += f"; the given {'constraint' if options['is_absolute'] else 'ratio'} makes it {worse} in {losing}"
  text += "."
  asked, stopping = options["constraint_ratio"], limits["stopping_ratio"]["first"]
  if stopping is not None and asked > stopping:
    text += (
      f" HAMU's aggregate criterion is met above {stopping * unit:.3g}, so it is met at the first step"
      f"{' and would stop the run' if options['stop_on_criterion'] else ''}."
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
    f"The first step of {name} should change {changes('predicted')} nats; when taken, it changes "
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
      f" For the {' and the '.join(missed)} loss, the first-order prediction does not hold at this length; "
      "a lower config.method.optimizer.learning_rate makes it more accurate."
    )
  return text


def _roles(variant: str) -> tuple[str, str]:
  """The role whose loss a variant optimises, and the role whose loss it constrains."""
  return ("forget", "retain") if variant == "hamu-u" else ("retain", "forget")


def tables(report: Mapping[str, Any]) -> str:
  """Formats the blocks, their updates and the steps as aligned text, at most 100 columns wide.

  If there are many blocks, those with the largest product of gradient norms are shown, in the model's order.

  Args:
    report: report of `analyse`.
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
  return _in_two(header, rows, header.index("branch"))


def _in_two(header: tuple[str, ...], rows: list[list[str]], place: int) -> str:
  """A table that would be wider than a terminal, in two with the same first column."""
  first = format_table(header[:place], [cells[:place] for cells in rows])
  second = format_table((header[0], *header[place:]), [[cells[0], *cells[place:]] for cells in rows])
  return f"{first}\n\n{second}"


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
  """A value of the first pair with the mean and spread of all pairs, or only the latter."""
  if value["first"] is None:
    return _UNBOUNDED
  if value["std"] is None:
    return f"{unit * value['first']:{form}}"
  plain = form.replace("+", "")
  spread = f"{unit * value['mean']:{form}} ± {unit * value['std']:{plain}}"
  return f"{unit * value['first']:{form}} ({spread})" if first else spread


def _cell(ratio: float | None) -> str:
  return _UNBOUNDED if ratio is None else f"{ratio:.3g}"
