"""The registry."""

import jax
import pytest

from hamu_jax import models
from hamu_jax.errors import UserError


def test_unknown_name_is_answered_with_the_nearest():
  with pytest.raises(UserError, match="'resnt20'.*'resnet20'.*resnet8.*mlp"):
    models.build_model("resnt20", num_classes=10)


def test_unknown_option_is_answered_with_the_choices():
  with pytest.raises(UserError, match="'resnet20' has no option 'widht'.*width"):
    models.build_model("resnet20", num_classes=10, widht=3)
  with pytest.raises(UserError, match="'depth'"):
    models.build_model("resnet20", num_classes=10, depth=8)


def test_platform_defaults_to_the_backend():
  assert models.build_model("resnet20", num_classes=10).platform == jax.default_backend()
  assert models.build_model("resnet20", num_classes=10, platform="tpu").platform == "tpu"


@pytest.mark.parametrize("name", ["resnet8", "resnet32", "resnet110"])
def test_depth_is_in_the_name(name):
  assert models.build_model(name, num_classes=10).depth == int(name.removeprefix("resnet"))
