"""The sharpness paper's settings, by its text and its predecessor RUM, and the words that choose them."""

import itertools

import pytest

from hamu_jax.config import validation
from hamu_jax.config.sharpness_paper import sharp_config
from hamu_jax.engine.methods import METHODS


def config_of(variant=""):
  return sharp_config(variant)[0]


def test_training_is_the_papers():
  config = config_of()
  train = config.train
  assert (train.epochs, train.batch_size, train.augment, train.select) == (200, 256, "crop_flip", "best")
  assert (train.optimizer.name, train.optimizer.learning_rate, train.optimizer.schedule) == (
    "sgd",
    0.1,
    "cosine",
  )
  assert (train.optimizer.momentum, train.optimizer.weight_decay) == (0.9, 5e-4)
  assert (config.data.validation_fraction, config.data.forget_size) == (0.1, 3000)
  assert config.mask.fractions == (0.1, 0.3, 0.5)
  assert config.evaluate.membership and config.retrain


# Learning rate and epochs.
SCHEDULES = {
  "ft": (0.01, 10),
  "ft_l1": (0.01, 10),
  "ga": (1e-4, 5),
  "neggrad": (0.01, 5),
  "scrub_distill": (5e-3, 5),
  "random_label": (0.1, 10),
  "salun": (0.1, 10),
  "sharp_minmax": (0.01, 5),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_unlearning_is_rums(name):
  config = config_of(name)
  method = config.method
  assert (method.name, method.optimizer.learning_rate, method.epochs) == (name, *SCHEDULES[name])
  assert (method.optimizer.name, method.optimizer.momentum) == ("sgd", 0.9)
  assert method.optimizer.weight_decay == 5e-4
  assert (method.retain_weight, method.msteps, method.temperature) == (0.99, 4, 4)
  assert (method.shuffle, method.epoch, method.batch_norm) == ("each_epoch", "pass", "batch")
  assert (method.clip_norm, method.batch_size) == (0, 256)
  assert (config.mask.fraction > 0) == METHODS[name].needs_mask


def test_the_papers_code_unlearns_with_adamw():
  optimizer = config_of("neggrad,adamw").method.optimizer
  assert (optimizer.name, optimizer.momentum, optimizer.weight_decay) == ("adamw", None, 5e-4)


@pytest.mark.parametrize("name", ["hamu-q", "hamu-u"])
@pytest.mark.parametrize("more", ["", ",adamw", ",sam,adaptive"])
def test_hamu_keeps_the_optimizer_that_applies_its_step_as_it_is(name, more):
  method = config_of(name + more).method
  optimizer = method.optimizer
  assert (optimizer.name, optimizer.momentum, optimizer.nesterov) == ("sgd", None, None)
  assert (optimizer.weight_decay, optimizer.schedule, method.clip_norm) == (0, "constant", 1)


@pytest.mark.parametrize(
  ("variant", "rho", "train_rho", "adaptive"),
  [
    ("", 0, 0, False),
    ("sam", 0.1, 0, False),
    ("pretrain_sam", 0, 0.1, False),
    ("sam,adaptive", 1, 0, True),
    ("sam,pretrain_sam,adaptive", 1, 1, True),
  ],
)
def test_sharpness_is_chosen_by_words(variant, rho, train_rho, adaptive):
  sam = config_of(variant).sam
  assert (sam.rho, sam.train_rho, sam.adaptive, sam.lamb) == (rho, train_rho, adaptive, 1)


def test_method_and_level_have_defaults():
  config, smoke = sharp_config()
  assert (config.method.name, config.data.memorization_level, smoke) == ("neggrad", "high", False)
  assert (config.data.forget, sharp_config("smoke")[1]) == ("memorization", True)


def test_the_order_of_words_does_not_matter():
  words = ("salun", "low", "sam", "adaptive")
  configs = [config_of(",".join(order)) for order in itertools.permutations(words)]
  assert all(config == configs[0] for config in configs)
  assert configs[0] != config_of("salun,low,sam")
  assert configs[0].data.memorization_level == "low"


@pytest.mark.parametrize(
  ("variant", "message"),
  [
    ("sharp_minmx", "variant word 'sharp_minmx' is unknown; choose from ft, .*; high, .*; sam, .*smoke$"),
    ("ft,sam,ga", "variant word 'ga' is the second method; give one$"),
    ("low,high", "variant word 'high' is the second level; give one$"),
    ("neggrad,high ", "variant word 'high ' is unknown"),
  ],
)
def test_words_that_cannot_be_meant_are_refused(variant, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    sharp_config(variant)


def test_the_ensemble_has_an_optimizer_of_its_own():
  config = config_of()
  assert config.memorization.optimizer == config.train.optimizer
  config.train.optimizer.learning_rate = 7.0
  assert config.memorization.optimizer.learning_rate == 0.1


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if not row.for_language])
def test_every_method_of_the_table_has_a_variant(name):
  config = config_of(name)
  config.data.scores = "estimate"
  validation.validate(config)
  assert config.method.name == name
