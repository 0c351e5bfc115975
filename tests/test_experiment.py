"""What an experiment says about how it ended, and what its stages depend on."""

import pathlib

import pytest

from hamu_jax import config as config_lib
from hamu_jax import experiment, loop, models, preemption, vision
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
    return experiment.Experiment(config, folder, watch)._plan.keys


def differing(before, after):
  assert before.keys() == after.keys()
  return {name for name in before if before[name] != after[name]}


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
  assert differing(keys(tmp_path), keys(tmp_path, **override)) == changed


def test_a_masked_stage_depends_on_its_own_fraction_and_on_how_the_mask_is_made(tmp_path):
  masked = {"mask__fraction": 0.3}
  before = keys(tmp_path, **masked)
  another = keys(tmp_path, mask__fractions=(0.2, 0.3), **masked)
  assert differing(before, another) == {"mask"}
  assert differing(before, keys(tmp_path, mask__select="smallest", **masked)) == {"mask", "unlearn"}
  assert differing(before, keys(tmp_path, mask__scope="gradient", **masked)) == {"unlearn"}


@pytest.mark.parametrize("independent", [{"data__validation_fraction": 0.1}, {"train__select": "last"}])
def test_one_original_serves_every_forget_set_that_does_not_select_it(tmp_path, independent):
  before, after = (keys(tmp_path, data__forget_class=(label,), **independent) for label in (0, 1))
  assert differing(before, after) == {"retrain", "mask", "unlearn"}


def test_imported_weights_stand_for_pretraining(tmp_path):
  config = config_lib.default_config()
  model = config_lib.build_model(config.model, num_classes=10)
  for name, seed in (("a", 0), ("b", 1)):
    variables = vision.make_init(model, (8, 8, 1))(seed)
    models.save_weights(tmp_path / name, variables)
  options = {"model__name": "resnet20"}
  before, after = (keys(tmp_path, model__weights=str(tmp_path / name), **options) for name in "ab")
  assert differing(before, after) == {"pretrain", "mask", "unlearn"}
