"""The default configuration is the paper's, and every field of the method section does something."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hamu_jax.config import default as config_lib
from hamu_jax.config import validation
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.engine import methods, objectives, sub_step
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.train_state import create_state
from hamu_jax.errors import UserError
from hamu_jax.experiment import experiment
from hamu_jax.paired import Paired
from hamu_jax.run import preemption
from sam_jax import memorization

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"


def load(name):
  namespace = {}
  exec((CONFIGS / name).read_text(), namespace)
  return namespace["get_config"]


def test_defaults_are_those_of_the_paper():
  config = load("cifar_hamu.py")()
  assert config.model.name == "resnet20"
  assert (config.train.optimizer.name, config.train.optimizer.learning_rate) == ("adamw", 1e-3)
  assert (config.train.epochs, config.train.batch_size, config.train.select) == (50, 5000, "best")
  method = config.method
  assert (method.name, method.epochs, method.batch_size) == ("hamu-q", 25, 5000)
  assert (method.optimizer.name, method.optimizer.learning_rate) == ("sgd", 1e-4)
  assert (method.constraint, method.constraint_ratio, method.clip_norm) == (None, 0.5, 1)
  assert (method.share, method.scope, method.radius) == ("grad_norm", "tensor", None)
  assert (method.alpha, method.gamma) == (0.001, 0.99)
  assert config.data.mean == (0.4914, 0.4822, 0.4465)
  assert config.data.std == (0.2023, 0.1994, 0.2010)
  assert config.data.forget_class == (0,)


@pytest.mark.parametrize(
  ("name", "argument"),
  [("cifar_hamu.py", ()), ("cifar_hamu.py", ("smoke",)), ("digits_hamu.py", ())],
)
def test_configs_are_valid(name, argument):
  validation.validate(load(name)(*argument))


OF_IMAGES = [name for name, row in methods.METHODS.items() if not row.for_language]
# Experiments of the sharpness paper, by the model of their full and of their smoke form.
SHARP = {
  "cifar100_resnet50.py": ("resnet50", "resnet18"),
  "cifar100_vit_s.py": ("vit_s", "vit_s"),
  "cifar10_sharp.py": ("resnet18", "resnet8"),
  "digits_sharp.py": ("resnet8", "resnet8"),
  "imagenet_resnet50.py": ("resnet50_imagenet", "resnet18"),
}


# Of language models, with the words of their variants.
LANGUAGE = {
  "tofu_smollm2_hamu.py": ("", "smoke"),
  "tofu_llama2_hamu.py": ("", "gpu"),
  "waterdrum_llama2_hamu.py": ("", "forget_01", "exact,gpu", "forget_10,semantic"),
}


@pytest.mark.parametrize(
  ("name", "variant"), [(name, variant) for name, variants in LANGUAGE.items() for variant in variants]
)
def test_language_configs_are_valid_for_their_methods(name, variant):
  config = load(name)(variant)
  for method, row in methods.METHODS.items():
    config.method.name = method
    if method in ("ft_l1", "salun", "sharp_minmax"):
      with pytest.raises(UserError, match=rf"config.method.name='{method}': is for image models"):
        validation.validate(config)
    else:
      validation.validate(config)
    assert not (row.for_language and row.needs_mask)


@pytest.mark.parametrize(
  ("name", "variant"),
  [
    ("tofu_llama2_hamu.py", "tpu"),
    ("waterdrum_llama2_hamu.py", "forget_01,forget_05"),
    ("tofu_smollm2_hamu.py", "smok"),
  ],
)
def test_unknown_variants_are_refused(name, variant):
  with pytest.raises(ValueError, match=name):
    load(name)(variant)


def test_no_config_is_left_out():
  assert {path.name for path in CONFIGS.glob("*.py")} == {
    "cifar_hamu.py",
    "digits_hamu.py",
    *SHARP,
    *LANGUAGE,
  }


@pytest.mark.parametrize("smoke", [False, True], ids=["full", "smoke"])
@pytest.mark.parametrize("name", SHARP)
def test_sharp_configs_are_valid_in_all_variants(name, smoke, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  # ImageNet's published scores.
  (tmp_path / "imagenet_index.npz").touch()
  get_config = load(name)
  for method, level, sam in itertools.product(OF_IMAGES, memorization.LEVELS, ("", "sam", "sam,adaptive")):
    if sam and not methods.METHODS[method].unlearns:
      continue
    words = [method, level, sam, "smoke" if smoke else ""]
    config = get_config(",".join(filter(None, words)))
    validation.validate(config)
    assert config.model.name == SHARP[name][smoke]
    assert (config.method.name, config.data.memorization_level) == (method, level)
    assert (config.sam.rho > 0, config.sam.adaptive) == (bool(sam), "adaptive" in sam)
    if method.startswith("hamu"):
      optimizer = config.method.optimizer
      assert (optimizer.name, optimizer.momentum, optimizer.weight_decay) == ("sgd", None, 0), words
    # A forget set is smaller than what is retained, and filled by at least one batch.
    assert max(config.method.batch_size, config.mask.batch_size) <= config.data.forget_size, words


@pytest.mark.parametrize("name", [name for name in SHARP if name != "cifar10_sharp.py"])
def test_the_digits_forms_could_start(name, tmp_path):
  config = load(name)("sharp_minmax,sam,smoke")
  with preemption.Watch() as watch:
    experiment.Experiment(config, tmp_path / "run", watch)


def test_an_undeclared_field_is_refused_wherever_it_comes_from():
  config = config_lib.default_config()
  config.method.aplha = 1.0
  message = "config.method.aplha: no such field; the nearest is config.method.alpha"
  with pytest.raises(UserError, match=message):
    validation.validate(config)


def test_a_missing_field_is_refused():
  config = config_lib.default_config()
  del config.method.gamma
  with pytest.raises(UserError, match="config.method.gamma: missing"):
    validation.validate(config)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("constraint", 2e-4, "constraint=0.0002.*at most 0.0001"),
    ("constraint_ratio", 1.01, "at most 1"),
    ("radius", -1.0, "radius=-1.0"),
    ("max_norm", 0.0, "max_norm=0.0: must be above 0"),
    ("share", "eqal", "did you mean 'equal'"),
    ("epochs", 0.0, "epochs=0.0: must be at least 1e-06"),
    ("batch_size", 0, "batch_size=0"),
    ("augment", "crop", "augment='crop'"),
  ],
)
def test_bad_method_values_are_refused(field, value, message):
  config = config_lib.default_config()
  config.method[field] = value
  with pytest.raises(UserError, match=message):
    validation.validate(config)


def test_a_constraint_no_global_radius_allows_is_refused():
  config = config_lib.default_config()
  config.method.update(scope="global", radius=0.1, constraint=0.2)
  with pytest.raises(UserError, match="radius 0.1 with gradients clipped to 1.*at most 0.1"):
    validation.validate(config)


LOOSE = {"stop_on_loss": True, "min_forget_loss": 0.0, "max_retain_loss": 9.0}
# For each field: the method to see it with, other fields it needs, and the value to change it to.
EFFECTS = {
  "clip_norm": ("ft", {}, 0.01),
  "constraint": ("hamu-q", {}, 0.02),
  "constraint_ratio": ("hamu-q", {}, 0.1),
  "radius": ("hamu-q", {}, 0.5),
  "share": ("hamu-q", {}, "equal"),
  "normalize_share": ("hamu-q", {}, False),
  "scope": ("hamu-q", {}, "global"),
  "on_infeasible": ("hamu-q", {"constraint_ratio": 0.9}, "exceed"),
  "stop_on_criterion": ("hamu-q", {"constraint_ratio": 0.9}, True),
  "criterion": ("hamu-q", {"stop_on_criterion": True, "constraint_ratio": 0.075}, "descent"),
  "stop_on_loss": ("gdiff", {"max_retain_loss": 0.001}, True),
  "max_retain_loss": ("gdiff", LOOSE, 0.001),
  "min_forget_loss": ("gdiff", LOOSE, 9.0),
  "max_norm": ("gru", {}, 0.01),
  "reference_sign": ("pcgrad", {}, True),
  "alpha": ("scrub", {}, 0.5),
  "gamma": ("scrub", {}, 0.1),
  "beta": ("scrub_distill", {}, 0.9),
  "temperature": ("scrub_distill", {}, 1.0),
  "retain_weight": ("neggrad", {}, 0.5),
  "l1_weight": ("ft_l1", {}, 0.1),
  "l1_free_epochs": ("ft_l1", {"epochs": 2.0, "l1_weight": 0.1}, 2.0),
  "retain_mode": ("sharp_minmax", {}, "max"),
  "forget_mode": ("sharp_minmax", {}, "min"),
  "optimizer": ("gdiff", {}, config_lib.optimizer_config("adamw", 0.1)),
}
# Read by the data side and by the loop, where their own tests change them.
ELSEWHERE = {
  "name",
  "epochs",
  "max_steps",
  "repeats",
  "batch_size",
  "augment",
  "evaluate_epochs",
  "msteps",
  "shuffle",
  "epoch",
  "batch_norm",
  "microbatch",
  "seed",
  # Of language models, see test_language_terms.
  "retain_coefficient",
  "forget_coefficient",
  "preference_beta",
  "margin",
  "layer",
  "steering",
}


def test_every_method_field_is_accounted_for():
  assert set(EFFECTS) | ELSEWHERE == set(config_lib.default_config().method)


def final_params(options, opposed=False):
  """Parameters after three steps; `opposed` gives both roles the same images with opposite labels."""
  rng = np.random.default_rng(5)
  classes = 2 if opposed else 3
  images, labels = rng.normal(size=(40, 6)), rng.integers(0, classes, 40)
  if opposed:
    images[20:], labels[20:] = images[:20], 1 - labels[:20]
  data = jnp.asarray(images), jnp.asarray(labels)

  def forward(variables, batch, key, train):
    del key, train
    params = variables["params"]
    return objectives.Outputs(batch["image"] @ params["w"] + params["b"][None]), {}

  def fetch(data, indices, key):
    del key
    return {"image": data[0][indices], "label": data[1][indices], "mask": indices >= 0}

  masked = methods.METHODS[options.name].needs_mask
  program = step_lib.make_step(
    methods.METHODS[options.name],
    options,
    forward=forward,
    fetch=fetch,
    pairing="sequential",
    train=False,
    schedule=optax.constant_schedule(1.0),
    sharpness=sub_step.Sharpness() if masked else None,
    mask_scope="update" if masked else None,
  )
  weights = (0.1 if opposed else 1.0) * jnp.asarray(rng.normal(size=(6, classes)))
  params = {"w": weights, "b": jnp.zeros(classes)}
  hyperparameters = hyperparameters_of(options, methods.METHODS[options.name], {"rho": 0.1, "lamb": 1.0})
  state = create_state({"params": params}, program.optimizers(hyperparameters), 0)
  step = jax.jit(program.step)
  indices = Paired(jnp.arange(20), jnp.arange(20, 40))
  reference = {"params": jax.tree.map(lambda leaf: leaf + 0.1, params), "batch_stats": {}}
  mask = jax.tree.map(lambda leaf: jnp.arange(leaf.size).reshape(leaf.shape) % 2, params)
  batches = step_lib.Batches(indices, jnp.int32(0))
  for _ in range(3):
    state, _ = step(state, sub_step.Frozen(reference, mask), data, batches, hyperparameters)
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])


@pytest.mark.parametrize("field", [field for field, effect in EFFECTS.items() if effect])
def test_each_method_field_changes_what_happens(field):
  name, needed, value = EFFECTS[field]
  results = []
  for override in ({}, {field: value}):
    options = config_lib.default_config().method
    options.optimizer.learning_rate = 0.1
    options.update({"name": name, "on_infeasible": "project"} | needed)
    for key, new in override.items():
      options[key] = new
    results.append(final_params(options, opposed=field == "criterion"))
  assert np.isfinite(results[1]).all()
  assert not np.array_equal(*results)
