"""The reason why a stage ended, as a sentence."""

import ml_collections

from hamu_jax.engine.stage import Outcome
from hamu_jax.transforms.stop import Stop


def describe_stop(outcome: Outcome, options: ml_collections.ConfigDict) -> str:
  """Says in one sentence why a stage ended.

  Args:
    outcome: outcome of the stage.
    options: `config.method`.
  """
  last = outcome.last_metrics
  after = f"after {outcome.steps} applied steps"
  match outcome.stop:
    case Stop.NONE:
      return f"finished {after}"
    case Stop.INFEASIBLE:
      rate, most = float(last["learning_rate"]), float(last["feasible_ratio"])
      field, asked, unit = "constraint_ratio", options.constraint_ratio, " times the learning rate"
      if options.constraint is not None:
        field, asked, most, unit = "constraint", options.constraint, most * rate, ""
      return (
        f"infeasible {after}: the constraint asks for {asked:.4g}{unit}, but the radius allows at most "
        f"{most:.4g} in every block; lower config.method.{field} to that, or set "
        "config.method.on_infeasible=project"
      )
    case Stop.CRITERION:
      return f"stopping criterion met {after}: margin {float(last['stopping_margin']):.4g} > 0"
    case Stop.RETAIN_LOSS:
      return f"retain loss {float(last['retain_loss']):.4g} above its threshold {after}"
    case Stop.FORGET_LOSS:
      return f"forget loss {float(last['forget_loss']):.4g} below its threshold {after}"
  return f"a loss, gradient or update was not finite {after}; the last good model is kept"
