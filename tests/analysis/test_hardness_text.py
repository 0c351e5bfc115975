"""The verdict on reports made by hand, in words."""

import pytest

from hamu_jax.analysis.hardness_text import verdict


def _value(first, mean=None):
  return {"first": first, "mean": first if mean is None else mean, "std": 0.5}


def _hand_made(angles, *, ratio=0.5, feasible=0.8, free=0.6, infeasible=0, losing=0, **options):
  step = {"stop": {"first": "none", "counts": {"none": 3}}, "length": _value(0.1)} | {
    role: {
      "predicted": _value(change),
      "happened": _value(1.1 * change),
      "is_zero": {"first": False, "share": 0.0},
    }
    for role, change in (("retain", -0.01), ("forget", 0.02))
  }
  return {
    "method": "hamu-q",
    "pairs": 3,
    "weights": 10 * len(angles),
    "blocks": [{"name": f"b{t}", "weights": 10, "angle": _value(angle)} for t, angle in enumerate(angles)],
    "whole": {"angle": _value(45.0)},
    "options": {
      "learning_rate": 0.1,
      "constraint": 0.1 * ratio,
      "constraint_ratio": ratio,
      "is_absolute": False,
      "variant": "hamu-q",
      "scope": "tensor",
      "on_infeasible": "stop",
      "stop_on_criterion": False,
    }
    | options,
    "limits": {
      "feasible_ratio": _value(feasible),
      "free_ratio": _value(free),
      "infeasible": _value(infeasible),
      "losing": _value(losing),
      "stopping_ratio": _value(0.7),
    },
    "steps": {"hamu-q": step},
  }


@pytest.mark.parametrize(
  "angles, begins",
  (
    ((10, 20, 100), "hard: 67 % of the weights lie in blocks with an angle under 60 degrees, 33 % in blocks"),
    ((70, 20, 100), "moderate: 33 %"),
    ((90, 120, 30), "easy: 33 %"),
  ),
)
def test_the_verdict_goes_by_the_weights(angles, begins):
  assert verdict(_hand_made(angles)).startswith(begins)


@pytest.mark.parametrize(
  "changes, says",
  (
    (
      {},
      "constraint_ratio 0.5 is feasible in 2 of 2 blocks; the largest that is feasible in all blocks is 0.8 ",
    ),
    (
      {},
      "Up to 0.6 (0.6 ± 0.5) the retain loss need not rise in any block. The first step of hamu-q should "
      "change the retain loss by -0.01 and the forget loss by +0.02 nats; when taken, it changes the retain "
      "loss by -0.011 and the forget loss by +0.022.",
    ),
    ({"losing": 1}, "need not rise in any block; the given ratio makes it rise in 1."),
    (
      {"infeasible": 2, "feasible": 0.4},
      "feasible in 0 of 2 blocks; the largest that is feasible in all blocks is 0.4 (0.4 ± 0.5). hamu-q "
      "would stop before its first step: lower config.method.constraint_ratio to that, or set "
      "config.method.on_infeasible=",
    ),
    ({"infeasible": 1, "on_infeasible": "project"}, "goes as far for the forget loss as the radius allows"),
    ({"infeasible": 1, "on_infeasible": "exceed"}, "longer than the radius"),
    (
      {"infeasible": 1, "scope": "global"},
      "constraint_ratio 0.5 is not feasible; the largest feasible one is 0.8",
    ),
    (
      {"is_absolute": True},
      "The constraint 0.05 is feasible in 2 of 2 blocks; the largest that is feasible in all blocks is 0.08 ",
    ),
    (
      {"variant": "hamu-u", "losing": 1},
      "the forget loss need not fall in any block; the given ratio makes it fall in 1.",
    ),
    ({"ratio": 0.75}, "aggregate criterion is met above 0.7, so it is met at the first step."),
    ({"ratio": 0.75, "stop_on_criterion": True}, "so it is met at the first step and would stop the run."),
  ),
)
def test_the_verdict_in_words(changes, says):
  assert says in verdict(_hand_made((70, 80), **changes))


def test_a_step_that_first_order_does_not_describe_is_called_so():
  report = _hand_made((70, 80))
  report["steps"]["hamu-q"]["forget"]["happened"] = _value(0.05)
  assert "For the forget loss, the first-order prediction does not hold at this length" in verdict(report)
