"""The digits stand in for any dataset: their own statistics, and sizes that they can fill."""

import numpy as np
import pytest

from hamu_jax import data
from hamu_jax.config import default as config_lib
from hamu_jax.config import validation
from hamu_jax.config.digits import on_digits
from hamu_jax.config.sharpness_paper import sharp_config
from hamu_jax.engine.methods import METHODS


def imagenet(variant):
  config, _ = sharp_config(variant)
  config.data.update(
    name="ILSVRC/imagenet-1k",
    test_split="validation",
    image_size=224,
    stream=True,
    label_key="label",
    subset="default",
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    scores="imagenet_index.npz",
  )
  config.train.optimizer.warmup_epochs = 5.0
  config.method.augment = "random_resized_crop"
  return config


def test_images_are_normalized_by_their_own_statistics():
  config = on_digits(imagenet(""), "mlp")
  pixels = data.load("digits").train.images / 255
  np.testing.assert_allclose(config.data.mean, [pixels.mean()], atol=5e-4)
  np.testing.assert_allclose(config.data.std, [pixels.std()], atol=5e-4)


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if not row.for_language])
def test_nothing_is_left_of_the_other_dataset(name):
  config = imagenet(name)
  assert on_digits(config, "resnet18", width=16) is config
  validation.validate(config)
  assert (config.model.name, config.model.width, config.method.name) == ("resnet18", 16, name)
  digits = config_lib.load_dataset(config.data)
  held_out = len(data.validation_indices(digits.train.labels, config.data.validation_fraction, 0))
  available = len(digits.train.labels) - held_out
  forget = config.data.forget_size
  assert config.train.batch_size <= available - forget
  assert max(config.method.batch_size, config.mask.batch_size) <= forget
  assert config.memorization.batch_size <= config.memorization.fraction * available
  sections = config.train, config.method, config.memorization
  assert {section.augment for section in sections} == {"none"}
