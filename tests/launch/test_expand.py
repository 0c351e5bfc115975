"""Sweep files as experiments: what the members are, what they share, and what is refused."""

import itertools
import pathlib

import pytest

from hamu_jax.config import command_line, readers, validation
from hamu_jax.engine import methods
from hamu_jax.errors import UserError
from hamu_jax.experiment import stage_plan
from hamu_jax.launch import expand, experiments
from hamu_jax.vision import task as vision

SWEEPS = pathlib.Path("configs/sweeps")
CIFAR = ("", "smoke", "digits")
LANGUAGE = ("", "gpu", "waterdrum", "waterdrum_gpu", "smollm2", "smoke")
SHARP = ("", "smoke")
# Members a seed: methods and values, counted by hand; and the variants.
NAMED = {
  "cifar_constraint": (20, CIFAR),
  "cifar_full_grad": (1, CIFAR),
  "cifar_stopping_criterion": (2, CIFAR),
  # 2 HAMU methods by 4 rules, 5 by 2.
  "cifar_stopping_rules": (18, CIFAR),
  "cifar_batch_size": (5, CIFAR),
  "cifar_optimizer": (2, CIFAR),
  "cifar_timing": (7, CIFAR),
  "cifar_additional_baselines": (7, CIFAR),
  "cifar_more_methods": (6, CIFAR),
  "cifar_rho": (35, CIFAR),
  # 9 methods with 3 seeds of unlearning.
  "cifar_seeds": (27, CIFAR),
  "llm_constraint": (20, LANGUAGE),
  "llm_full_grad": (4, LANGUAGE),
  "llm_stopping_criterion": (2, LANGUAGE),
  "llm_stopping_rules": (18, LANGUAGE),
  "llm_batch_size": (5, LANGUAGE),
  "llm_optimizer": (4, LANGUAGE),
  "llm_timing": (9, LANGUAGE),
  "llm_additional_baselines": (7, LANGUAGE),
  "llm_more_methods": (13, LANGUAGE),
  "llm_semantic_similarity": (14, ("", "gpu", "smoke", "smoke_exact")),
  # 8 methods at 3 levels with SAM in none, either or both trainings; retrain has one of them.
  "sharp_cifar100": (102, SHARP),
  "sharp_cifar100_vit": (102, SHARP),
  "sharp_imagenet": (102, SHARP),
  "sharp_cifar10": (102, SHARP),
  "sharp_digits": (102, SHARP),
  "sharp_mask": (36, SHARP),
}


@pytest.fixture(autouse=True)
def root(monkeypatch, request):
  monkeypatch.chdir(request.config.rootpath)


def members_of_named(name, variant):
  # ImageNet's published scores are not here.
  overrides = ["--config.data.scores=estimate"] if name == "sharp_imagenet" else []
  path = f"{SWEEPS / name}.py" + (f":{variant}" if variant else "")
  return expand.expand(path, overrides, stage_cache="stages")


# Smaller sets have fewer batch sizes, and exact duplicates are alone.
_FEWER = {
  ("cifar_batch_size", "digits"): 4,
  ("llm_batch_size", "smollm2"): 4,
  ("llm_batch_size", "smoke"): 3,
  ("llm_semantic_similarity", "smoke_exact"): 7,
}


def _count(name, variant):
  return _FEWER.get((name, variant), NAMED[name][0])


def test_no_sweep_is_left_out():
  assert {path.stem for path in SWEEPS.glob("*.py")} == NAMED.keys()


@pytest.mark.parametrize("name", NAMED)
def test_named_sweeps_are_valid(name, monkeypatch):
  monkeypatch.setattr(experiments, "SEEDS", (41,))
  _, variants = NAMED[name]
  smoke = members_of_named(name, "smoke")
  assert len(smoke) == _count(name, "smoke")
  assert f"configs/sweeps/{name}.py" in (SWEEPS / f"{name}.py").read_text()
  # The others differ in their configuration, not in their axes.
  for variant in variants:
    expand.load_sweep(f"{SWEEPS / name}.py:{variant}")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "variant"), [(name, variant) for name, (_, variants) in NAMED.items() for variant in variants]
)
def test_named_sweeps_are_valid_in_all_variants(name, variant):
  members = members_of_named(name, variant)
  assert len(members) == 3 * _count(name, variant)
  assert {member.config.seed for member in members} == {41, 42, 43}


_HAMU = {"hamu-q", "hamu-u"}
_PAIRS = {"ft", "ga", "gdiff", "kl", "scrub"}
_RATIOS = {0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}
# What the scripts of HAMU's experiments run: methods, and the values of what they vary. Where a script varies
# or sets nothing, the learning rate is 1e-4, the ratio 0.5, rho 0, and a run has all its epochs.
SCRIPTS = {
  "cifar_rho": (_HAMU | _PAIRS, {"data.hard_probability": {0, 0.25, 0.5, 0.75, 1}}),
  "cifar_constraint": (_HAMU, {"method.constraint_ratio": _RATIOS}),
  "cifar_full_grad": ({"hamu-q"}, {"method.scope": {"global"}}),
  "cifar_stopping_criterion": (
    _HAMU,
    {"method.stop_on_criterion": {True}, "method.criterion": {"published"}, "data.hard_probability": {0.5}},
  ),
  "cifar_batch_size": ({"hamu-q"}, {"method.batch_size": {128, 256, 512, 1024, 2048}}),
  "cifar_optimizer": (
    {"hamu-u"},
    {"method.optimizer.name": {"sgd", "adamw"}, "method.constraint_ratio": {0.9}},
  ),
  "cifar_timing": (_HAMU | _PAIRS, {"method.epochs": {1}, "method.evaluate_epochs": {0}}),
  "cifar_additional_baselines": (_PAIRS | {"gru", "pcgrad"}, {}),
  "llm_semantic_similarity": (_HAMU | _PAIRS, {"text.duplicates": {"none", "semantic"}}),
  "llm_constraint": (_HAMU, {"method.constraint_ratio": _RATIOS}),
  "llm_full_grad": (_HAMU, {"method.scope": {"tensor", "global"}}),
  "llm_optimizer": (_HAMU, {"method.optimizer.name": {"sgd", "adamw"}}),
  "llm_stopping_criterion": (_HAMU, {"method.stop_on_criterion": {True}}),
  "llm_batch_size": ({"hamu-q"}, {"method.batch_size": {16, 32, 50, 64, 128}}),
  "llm_timing": (_HAMU | _PAIRS | {"gru", "pcgrad"}, {"method.epochs": {1}}),
  "llm_additional_baselines": (_PAIRS | {"gru", "pcgrad"}, {}),
}
_ELSEWHERE = {
  "method.constraint_ratio": 0.5,
  "method.optimizer.learning_rate": 1e-4,
  "method.optimizer.name": "sgd",
  "method.scope": "tensor",
  "method.stop_on_criterion": False,
  "data.hard_probability": 0,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_sweeps_are_those_of_the_scripts(name):
  names, varied = SCRIPTS[name]
  members = members_of_named(name, "")
  found = [
    (
      member.config.method.name,
      *(readers.value_of(member.config, field) for field in varied),
      member.config.seed,
    )
    for member in members
  ]
  assert sorted(found) == sorted(itertools.product(names, *varied.values(), (41, 42, 43)))
  for member in members:
    for field, value in _ELSEWHERE.items():
      section = field.partition(".")[0]
      if field not in varied and section in member.config and (section != "data" or name.startswith("cifar")):
        assert readers.value_of(member.config, field) == value, (member.name, field)
    if name.startswith("cifar"):
      drawn = member.config.data.forget == "hard_probability"
      assert drawn == ("data.hard_probability" in varied)
      assert member.config.data.seed == (member.config.seed if drawn else 41)


def test_rho_draws_its_rows_with_the_seed():
  for member in members_of_named("cifar_rho", ""):
    assert member.config.data.seed == member.config.seed
    assert member.config.data.forget == "hard_probability"


def test_all_combinations_with_fields_words_and_named_choices(tmp_path):
  path = tmp_path / "sweep.py"
  path.write_text("""
def get_sweep(variant=""):
  return {
      "config": "configs/digits_sharp.py",
      "words": [["neggrad", "ga"], ["", "sam"]],
      "set": {"train.epochs": 2},
      "grid": {
          "steps": {"few": {"method.max_steps": 3}, "all": {}},
          "data.forget_size": [50],
      },
  }
""")
  members = expand.expand(str(path), ["--config.train.epochs=5"], stage_cache="there")
  names = [member.name for member in members]
  assert names == [
    "neggrad,steps=few,forget_size=50",
    "neggrad,steps=all,forget_size=50",
    "neggrad,sam,steps=few,forget_size=50",
    "neggrad,sam,steps=all,forget_size=50",
    "ga,steps=few,forget_size=50",
    "ga,steps=all,forget_size=50",
    "ga,sam,steps=few,forget_size=50",
    "ga,sam,steps=all,forget_size=50",
  ]
  for member in members:
    config = member.config
    assert config.method.name == member.name.split(",")[0]
    assert config.sam.rho == (0.1 if ",sam," in member.name else 0)
    assert config.method.max_steps == (3 if "few" in member.name else 0)
    assert config.data.forget_size == 50
    # The command line wins.
    assert config.train.epochs == 5
    assert config.stage_cache == "there"
    # What main makes of the arguments is what was validated.
    assert command_line.parse(["", *member.arguments]).config.to_dict() == config.to_dict()


def test_an_axis_that_a_method_does_not_read_is_refused(tmp_path):
  path = write(
    tmp_path,
    """
def get_sweep():
  return {
      "config": "configs/digits_hamu.py",
      "grid": {"method.name": ["scrub", "gdiff"], "method.alpha": [0.1, 0.2]},
  }
""",
  )
  with pytest.raises(UserError) as error:
    expand.expand(path, stage_cache="there")
  message = str(error.value)
  assert message.startswith("gdiff,alpha=0.1: config.method.alpha=0.1: nothing reads it here")
  assert "by the methods scrub" in message and "\n" not in message


def write(tmp_path, text):
  path = tmp_path / "sweep.py"
  path.write_text(text)
  return str(path)


DIGITS = '"config": "configs/digits_hamu.py"'
BAD = {
  "no function": ("x = 1", [], r"has no get_sweep\(\)"),
  "raises": ("def get_sweep():\n  return 1 / 0", [], "ZeroDivisionError: division by zero"),
  "syntax": ("def get_sweep(:", [], "SyntaxError"),
  "no block": ("def get_sweep():\n  return 3", [], "a block or a list of blocks, not 3"),
  "empty": ("def get_sweep():\n  return []", [], "a block or a list of blocks"),
  "no config": ('def get_sweep():\n  return {"grid": {}}', [], "a dict with a 'config'"),
  "unknown key": (f'def get_sweep():\n  return {{{DIGITS}, "gird": {{}}}}', [], "'gird' is not a key.*grid"),
  "an axis without a name": (
    f'def get_sweep():\n  return {{{DIGITS}, "grid": {{3: [1, 2]}}}}',
    [],
    "3 is not the name of a field; give a text",
  ),
  "a field without a name": (
    f'def get_sweep():\n  return {{{DIGITS}, "set": {{3: 1}}}}',
    [],
    "3 is not the name of a field; give a text",
  ),
  "words that are none": (
    f'def get_sweep():\n  return {{{DIGITS}, "words": [[1, 2]]}}',
    [],
    "'words' of a block is a list",
  ),
  "no values": (
    f'def get_sweep():\n  return {{{DIGITS}, "grid": {{"seed": 41}}}}',
    [],
    "axis 'seed' needs a list.*41",
  ),
  "empty axis": (f'def get_sweep():\n  return {{{DIGITS}, "grid": {{"seed": []}}}}', [], "'seed' needs a"),
  "no axes": (f'def get_sweep():\n  return {{{DIGITS}, "grid": ["seed"]}}', [], "'grid' of a block is"),
  "no fields": (f'def get_sweep():\n  return {{{DIGITS}, "set": "seed"}}', [], "'set' of a block is"),
  "no words": (
    f'def get_sweep():\n  return {{{DIGITS}, "words": ["sam"]}}',
    [],
    "'words' of a block is a list",
  ),
  "unknown field": (
    f'def get_sweep():\n  return {{{DIGITS}, "grid": {{"method.nmae": ["ft"]}}}}',
    [],
    "config.method.nmae: no such field; the nearest is config.method.name",
  ),
  "unknown override": (
    f"def get_sweep():\n  return {{{DIGITS}}}",
    ["--config.sede=3"],
    "config.sede: no such field",
  ),
  "type": (
    f'def get_sweep():\n  return {{{DIGITS}, "set": {{"seed": "many"}}}}',
    [],
    "config.seed='many': must be a whole number",
  ),
  "invalid": (
    f'def get_sweep():\n  return {{{DIGITS}, "grid": {{"method.name": ["ft", "hamu"]}}}}',
    [],
    "hamu: config.method.name='hamu': choose from",
  ),
  "no such config": (
    'def get_sweep():\n  return {"config": "configs/nope.py"}',
    [],
    "configs/nope.py: no such file",
  ),
  "no such variant": (
    'def get_sweep():\n  return {"config": "configs/cifar_hamu.py:huge"}',
    [],
    "huge is unknown; choose",
  ),
  "same twice": (
    f'def get_sweep():\n  return {{{DIGITS}, "grid": {{"seed": [41, 42, 41]}}}}',
    [],
    "two members are called 'seed=41'",
  ),
  # Another word for the same, and fields that change nothing.
  "same configuration": (
    f'def get_sweep():\n  return {{{DIGITS}, "grid": {{"on": {{"a": {{}}, "b": {{"seed": 41}}}}}}}}',
    [],
    "members 'on=a' and 'on=b' are the same experiment",
  ),
  "incidental": (
    f'def get_sweep():\n  return {{{DIGITS}, "grid": {{"checkpoint_seconds": [1.0, 2.0]}}}}',
    [],
    "'checkpoint_seconds=1.0' and 'checkpoint_seconds=2.0' are the same",
  ),
  "axis overridden": (
    f'def get_sweep():\n  return {{{DIGITS}, "grid": {{"seed": [41, 42]}}}}',
    ["--config.seed=3"],
    "--config.seed=3: the sweep varies seed; choose members with --filter",
  ),
}


@pytest.mark.parametrize(("text", "overrides", "message"), BAD.values(), ids=BAD)
def test_bad_sweeps_are_refused_in_one_line(tmp_path, text, overrides, message):
  with pytest.raises(UserError, match=message) as error:
    expand.expand(write(tmp_path, text), overrides, stage_cache="stages")
  assert len(str(error.value).splitlines()) == 1


def test_unknown_sweeps_and_variants_are_refused():
  with pytest.raises(UserError, match="no such sweep; in configs/sweeps there are.* cifar_constraint,"):
    expand.load_sweep("configs/sweeps/cifar.py")
  with pytest.raises(UserError, match="no such sweep; give a file"):
    expand.load_sweep("nowhere/cifar.py")
  with pytest.raises(UserError, match="variant 'tiny'.*choose from no variant, :smoke, :digits"):
    expand.load_sweep("configs/sweeps/cifar_constraint.py:tiny")


# Fields that a stage of these experiments may depend on, or not.
CHANGES = [
  {},
  {"method.name": "gdiff"},
  {"method.constraint_ratio": 0.05},
  {"seed": 42},
  {"train.epochs": 2},
  {"data.forget_class": (1,)},
  {"data.duplicates": 1},
  {"sam.rho": 0.1},
  {"sam.train_rho": 0.1},
  {"sam.train_rho": 0.1, "sam.train_mode": "max"},
  {"mask.fraction": 0.1},
  {"mask.fraction": 0.3},
  {"mask.select": "smallest", "mask.fraction": 0.1},
  {"evaluate.batch_size": 100},
  {"retrain": False},
  {"pairing": "vmap"},
  {"method.name": "retrain"},
]


@pytest.mark.parametrize("select", ["best", "last", "validation"])
def test_members_share_what_the_plan_of_the_stages_shares(select):
  """Equal keys from the configuration if and only if equal keys from the data."""
  plans, keys = [], []
  for change in CHANGES:
    config = command_line.parse(["", "--config=configs/digits_hamu.py", "--config.model.name=mlp"]).config
    config.data.validation_fraction = 0.1 * (select == "validation")
    config.train.select = "last" if select == "last" else "best"
    config.update_from_flattened_dict(change)
    config.method.batch_size = 64
    validation.validate(config)
    task = vision.Vision(config)
    split = task.request.split(None)
    stages = stage_plan.make_plan(config, task, split, devices=1).keys
    method = methods.METHODS[config.method.name]
    used = {
      "pretrain": True,
      "retrain": config.retrain or method.from_scratch,
      "mask": bool(config.mask.fraction) and method.unlearns,
    }
    plans.append({name: stages[name] for name, is_used in used.items() if is_used})
    keys.append(expand.shared_stages(config))
  for (plan, key), (other_plan, other_key) in itertools.combinations(zip(plans, keys), 2):
    assert plan.keys() == key.keys()
    for stage in plan.keys() & other_plan.keys():
      assert (plan[stage] == other_plan[stage]) == (key[stage] == other_key[stage]), stage


def test_an_ensemble_is_shared_between_levels():
  keys = []
  for level in ("high", "mid"):
    config = command_line.parse(["", f"--config=configs/digits_sharp.py:neggrad,{level}"]).config
    keys.append(expand.shared_stages(config))
  assert keys[0]["memorization"] == keys[1]["memorization"]
  assert keys[0]["pretrain"] == keys[1]["pretrain"]
  assert keys[0]["retrain"] != keys[1]["retrain"]
  config.memorization.parallel += 1
  assert expand.shared_stages(config) == keys[1]
  config.memorization.models += 1
  assert expand.shared_stages(config)["memorization"] != keys[1]["memorization"]
