"""The program of an experiment on images that is planned is the one that the loop runs on its data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hamu_jax.config import default as config_lib
from hamu_jax.config import share, validation
from hamu_jax.engine import methods, objectives, placement
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.errors import UserError
from hamu_jax.planning import vision as vision_plan
from hamu_jax.vision import feed as feed_lib

ROWS = 60


@pytest.fixture
def config():
  """A small model on 60 images of 8x8, half of which are forgotten."""
  config = config_lib.default_config()
  config.data.update(image_size=8, train_size=ROWS, forget="random", forget_fraction=0.5)
  config.model.name = "mlp"
  # Odd shares: neither is a multiple of the devices.
  config.method.update(batch_size=9, on_infeasible="project")
  share(config, "method", "mask")
  config.train.batch_size = 21
  return config


def images(stream):
  """The source of such a training split."""
  rng = np.random.default_rng(0)
  data = feed_lib.ImageData(
    rng.integers(0, 256, (ROWS, 8, 8, 3)).astype(np.uint8),
    rng.integers(0, 10, ROWS).astype(np.int32),
    np.arange(ROWS) % 2 == 0,
    np.arange(ROWS, dtype=np.int32),
  )
  return (feed_lib.StreamedImages if stream else feed_lib.ResidentImages)(data)


def filled(shapes):
  """Small numbers of these shapes."""
  return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01).astype(leaf.dtype), shapes)


@pytest.mark.parametrize(
  "method, pairing, stream, stage",
  [
    ("hamu-q", "pmap", True, "unlearn"),
    ("kl", "sequential", False, "unlearn"),
    ("random_label", "sequential", True, "unlearn"),
    ("scrub_distill", "pmap", False, "unlearn"),
    ("sharp_minmax", "pmap", True, "unlearn"),
    ("hamu-q", "pmap", True, "pretrain"),
    ("retrain", "vmap", False, "unlearn"),
  ],
)
def test_the_planned_program_runs_on_what_the_loop_feeds(method, pairing, stream, stage, config):
  config.method.name, config.pairing, config.data.stream = method, pairing, stream
  config.mask.fraction = 0.5 if methods.METHODS[method].needs_mask else 0.0
  validation.validate(config)
  stage = vision_plan.AbstractStage(config, jax.devices(), stage)
  lowered = stage.step()
  shapes = lowered.args_info[0]
  mesh = None
  if pairing == "pmap":
    mesh = pairing_lib.make_mesh(jax.devices(), stage.stage.method.device_groups)
  data, batches = images(stream).chunk(stage.stage.plan, 0, 2, mesh)
  state = filled(shapes[0]).replace(step=jnp.int32(0), stop=jnp.int32(0))
  frozen = shapes[1]
  needs_reference = methods.needs_reference(stage.stage.method, objectives.TERMS)
  assert (frozen.reference is not None) == needs_reference
  assert (frozen.mask is not None) == (method == "sharp_minmax")
  state, frozen = placement.place((state, filled(frozen)), mesh)
  # A compiled program takes no other shapes, types or places than it is compiled for.
  hyperparameters = stage.stage.hyperparameters
  state, _, done = lowered.compile()(
    state, frozen, data, batches, placement.place(jnp.int32(2), mesh), hyperparameters
  )
  assert (int(state.step), int(state.stop), int(done)) == (2, 0, 2)


@pytest.mark.parametrize("name, batch, share", [("unlearn", 9, 5), ("pretrain", 21, 6)])
def test_shares_are_rounded_up(name, batch, share, config):
  config.pairing = "pmap"
  stage = vision_plan.AbstractStage(config, jax.devices(), name)
  assert (stage.examples_per_batch, stage.share) == (batch, share)
  config.pairing = "sequential"
  assert vision_plan.AbstractStage(config, jax.devices(), name).share == batch


@pytest.mark.parametrize("stage", ["unlearn", "pretrain"])
def test_devices_have_to_do_for_all_stages(stage, config):
  config.pairing, config.devices = "pmap", 3
  with pytest.raises(UserError, match="needs an even number of devices, one half a role, but got 3"):
    vision_plan.AbstractStage(config, jax.devices(), stage)
  # One role at a time takes any number.
  config.method.name = "ft"
  assert vision_plan.AbstractStage(config, jax.devices(), stage).share == {"unlearn": 3, "pretrain": 7}[stage]


def test_pieces_are_those_of_accelerators(config):
  config.data.update(image_size=32, train_size=6000)
  config.method.batch_size = 2500
  stage = vision_plan.AbstractStage(config, jax.devices())
  assert (stage.stage.microbatch, stage.trips) == (1024, (1, 3))
  config.method.microbatch = 500
  assert vision_plan.AbstractStage(config, jax.devices()).trips == (1, 5)
  # Batch statistics need all of a batch.
  assert vision_plan.AbstractStage(config, jax.devices(), "pretrain").trips == (1, 1)


@pytest.mark.parametrize(
  "source, name, size, expected",
  [
    ("huggingface", "uoft-cs/cifar10", 0, ("CIFAR-10", 50_000, (32, 32, 3), 10)),
    ("cifar10_binary", "", 0, ("CIFAR-10", 50_000, (32, 32, 3), 10)),
    ("tfds", "cifar100", 16, ("CIFAR-100", 50_000, (16, 16, 3), 100)),
    ("huggingface", "ILSVRC/imagenet-1k", 224, ("ImageNet-1k", 1_281_167, (224, 224, 3), 1000)),
  ],
)
def test_named_datasets(source, name, size, expected, config):
  config.data.update(source=source, name=name, image_size=size)
  assert vision_plan.find_sizes(config.data) == expected


def test_what_is_planned_is_told(config):
  config.data.update(name="imagenet2012", image_size=224, train_size=2000, stream=True)
  config.model.name, config.pairing = "resnet50_imagenet", "pmap"
  stage = vision_plan.AbstractStage(config, jax.devices())
  # As torchvision counts them.
  assert stage.parameters == (0, 25_557_032)
  # 512 MiB hold 198 steps of 18 images, but a program runs no more than 64.
  assert dict(stage.facts()) == {
    "step": "hamu-q, pmap, 9 images a role",
    "images": "ImageNet-1k: 2,000 of 224x224x3, 1000 classes; those of at most 64 steps on their devices",
    "batch": "at most 5 a role on a device, 1024 at a time",
  }
  stage = vision_plan.AbstractStage(config, jax.devices(), "pretrain")
  assert dict(stage.facts())["step"] == "pretrain, pmap, 21 images"


def test_memorized_rows_need_no_scores(config):
  config.data.update(
    train_size=0, forget="memorization", forget_size=3000, scores="estimate", validation_fraction=0.1
  )
  streams = vision_plan.AbstractStage(config, jax.devices()).stage.plan.streams
  assert [len(stream.indices) for stream in streams] == [42_000, 3000]


@pytest.mark.parametrize(
  "changes, error",
  [
    ({"name": "ufldl-stanford/svhn"}, "config.data.name=.*with one of uoft-cs/cifar10"),
    ({"name": "ILSVRC/imagenet-1k", "image_size": 0}, "config.data.image_size=0: .*ImageNet-1k"),
    ({"source": "digits", "image_size": 0}, "config.data.mean=.*1 channel"),
    ({"train_size": 60_000}, "config.data.train_size=60000: choose 1..50000"),
  ],
)
def test_what_is_not_known_is_said(changes, error, config):
  config.data.update(changes)
  with pytest.raises(UserError, match=error):
    vision_plan.AbstractStage(config, jax.devices())
