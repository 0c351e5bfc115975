"""What each stage of an experiment depends on."""

import pytest

from hamu_jax import models
from hamu_jax.config import default as config_lib
from hamu_jax.experiment import stage_plan
from hamu_jax.vision import task as vision


def keys(**overrides):
  config = config_lib.default_config()
  config.data.update(source="digits", mean=(0.5,), std=(0.5,))
  config.model.name = "mlp"
  config.train.batch_size = config.method.batch_size = 100
  for field, value in overrides.items():
    section, _, name = field.rpartition("__")
    (config[section] if section else config)[name] = value
  task = vision.Vision(config)
  return stage_plan.make_plan(config, task, task.request.split(None), devices=1).keys


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
    ({"method__seed": 1}, {"unlearn"}),
    ({"method__seed": 41}, set()),
    ({"evaluate__seed": 1}, set()),
    ({"sam__rho": 0.1}, {"unlearn"}),
    # Its values matter only where sharpness-aware gradients are on.
    ({"sam__lamb": 0.5}, set()),
    ({"sam__train_rho": 0.1}, EVERY),
    ({"sam__train_mode": "max"}, set()),
    ({"mask__fraction": 0.3}, {"unlearn"}),
    ({"mask__select": "smallest"}, {"mask"}),
    ({"checkpoint_seconds": 5.0}, set()),
    ({"keep_every": 5}, set()),
  ],
)
def test_a_stage_is_keyed_by_what_it_depends_on(override, changed):
  assert differing(keys(), keys(**override)) == changed


def test_training_has_a_sharpness_mode_of_its_own():
  sharp = {"sam__train_rho": 0.1}
  assert differing(keys(**sharp), keys(sam__train_mode="max", **sharp)) == EVERY
  config = config_lib.default_config()
  config.data.update(source="digits", mean=(0.5,), std=(0.5,))
  config.sam.update(rho=0.2, train_rho=0.1, train_mode="max")
  task = vision.Vision(config)
  stages = stage_plan.make_plan(config, task, task.request.split(None), devices=1).stages
  modes = {name: (stage.sam.rho, stage.sam.mode) for name, stage in stages.items()}
  assert modes == {"pretrain": (0.1, "max"), "retrain": (0.1, "max"), "unlearn": (0.2, "min")}


def test_a_masked_stage_depends_on_its_own_fraction_and_on_how_the_mask_is_made():
  masked = {"mask__fraction": 0.3}
  before = keys(**masked)
  another = keys(mask__fractions=(0.2, 0.3), **masked)
  assert differing(before, another) == {"mask"}
  assert differing(before, keys(mask__select="smallest", **masked)) == {"mask", "unlearn"}
  assert differing(before, keys(mask__scope="gradient", **masked)) == {"unlearn"}


@pytest.mark.parametrize("independent", [{"data__validation_fraction": 0.1}, {"train__select": "last"}])
def test_one_original_serves_every_forget_set_that_does_not_select_it(independent):
  before, after = (keys(data__forget_class=(label,), **independent) for label in (0, 1))
  assert differing(before, after) == {"retrain", "mask", "unlearn"}


def test_imported_weights_stand_for_pretraining(tmp_path):
  config = config_lib.default_config()
  model = config_lib.build_model(config.model, num_classes=10)
  for name, seed in (("a", 0), ("b", 1)):
    variables = vision.make_init(model, (8, 8, 1))(seed)
    models.save_weights(tmp_path / name, variables)
  options = {"model__name": "resnet20"}
  before, after = (keys(model__weights=str(tmp_path / name), **options) for name in "ab")
  assert differing(before, after) == {"pretrain", "mask", "unlearn"}


def test_a_method_from_scratch_is_the_retrained_model():
  config = config_lib.default_config()
  config.data.update(source="digits", mean=(0.5,), std=(0.5,))
  config.train.batch_size = 100
  config.method.name = "retrain"
  task = vision.Vision(config)
  plan = stage_plan.make_plan(config, task, task.request.split(None), devices=1)
  assert plan.final == "retrain"
  assert set(plan.stages) == {"pretrain", "retrain"}
