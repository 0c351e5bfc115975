"""What an experiment says about how it ended, and what its stages depend on."""

import pathlib

import pytest

from hamu_jax import config as config_lib
from hamu_jax import experiment, loop, preemption
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
  outcome = loop.Outcome(None, 7, stop, {}, metrics, 1.0)
  options = config_lib.default_config().method
  assert wanted in experiment.describe_stop(outcome, options)


def test_an_absolute_constraint_is_described_in_its_own_unit():
  options = config_lib.default_config().method
  options.constraint = 0.05
  outcome = loop.Outcome(
      None, 0, Stop.INFEASIBLE, {}, {"learning_rate": 0.1, "feasible_ratio": 0.2}, 1.0
  )
  text = experiment.describe_stop(outcome, options)
  assert "asks for 0.05, but the radius allows at most 0.02 in every block" in text
  assert "lower config.method.constraint to that" in text


def keys(tmp_path, **overrides):
  config = config_lib.default_config()
  config.data.update(source="digits", mean=(0.5,), std=(0.5,))
  config.model.name = "mlp"
  config.train.batch_size = config.method.batch_size = 100
  for field, value in overrides.items():
    section, _, name = field.rpartition("__")
    (config[section] if section else config)[name] = value
  folder = pathlib.Path(tmp_path) / str(len(list(tmp_path.iterdir())))
  with preemption.Watch() as watch:
    return experiment.Experiment(config, folder, watch)._keys


EVERY = {"pretrain", "retrain", "mask", "unlearn"}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ({"method__alpha": 0.5}, {"unlearn"}),
        ({"pairing": "vmap"}, {"unlearn"}),
        ({"train__epochs": 3}, EVERY),
        ({"data__forget_class": (1,)}, EVERY),
        ({"data__train_size": 1000}, EVERY),
        ({"data__validation_fraction": 0.1}, EVERY),
        ({"data__std": (0.4,)}, EVERY),
        ({"seed": 1}, EVERY),
        ({"sam__rho": 0.1}, {"unlearn"}),
        # Its values matter only where sharpness-aware gradients are on.
        ({"sam__lamb": 0.5}, set()),
        ({"sam__train_rho": 0.1}, EVERY),
        ({"mask__fraction": 0.3}, {"unlearn"}),
        ({"mask__select": "smallest"}, {"mask"}),
        ({"checkpoint_seconds": 5.0}, set()),
    ],
)
def test_a_stage_is_keyed_by_what_it_depends_on(tmp_path, override, changed):
  before, after = keys(tmp_path), keys(tmp_path, **override)
  assert {name for name in before if before[name] != after[name]} == changed
