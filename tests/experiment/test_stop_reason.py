"""What an experiment says about how it ended."""

import pytest

from hamu_jax.config import default as config_lib
from hamu_jax.engine import stage as stage_lib
from hamu_jax.experiment.stop_reason import describe_stop
from hamu_jax.transforms.stop import Stop


@pytest.mark.parametrize(
  ("stop", "metrics", "wanted"),
  [
    (Stop.NONE, {}, "finished after 7 applied steps"),
    (
      Stop.INFEASIBLE,
      {"learning_rate": 0.1, "feasible_ratio": 0.2},
      "infeasible after 7 applied steps: the constraint asks for 0.5 times the learning rate, but "
      "the radius allows at most 0.2 in every block",
    ),
    (Stop.CRITERION, {"stopping_margin": 0.25}, "criterion met after 7 applied steps: margin 0.25"),
    (Stop.RETAIN_LOSS, {"retain_loss": 0.5}, "retain loss 0.5 above its threshold after 7"),
    (Stop.FORGET_LOSS, {"forget_loss": 0.01}, "forget loss 0.01 below its threshold after 7"),
    (Stop.NONFINITE, {}, "not finite after 7 applied steps; the last good model is kept"),
  ],
)
def test_every_way_to_end_is_described(stop, metrics, wanted):
  outcome = stage_lib.Outcome(None, 7, stop, {}, metrics, 1.0)
  options = config_lib.default_config().method
  assert wanted in describe_stop(outcome, options)


def test_an_absolute_constraint_is_described_in_its_own_unit():
  options = config_lib.default_config().method
  options.constraint = 0.05
  outcome = stage_lib.Outcome(
    None, 0, Stop.INFEASIBLE, {}, {"learning_rate": 0.1, "feasible_ratio": 0.2}, 1.0
  )
  text = describe_stop(outcome, options)
  assert "asks for 0.05, but the radius allows at most 0.02 in every block" in text
  assert "lower config.method.constraint to that" in text
