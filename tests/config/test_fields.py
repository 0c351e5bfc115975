"""The table of fields: complete, consistent, and held against what is set."""

import re

import pytest

from hamu_jax import data
from hamu_jax.config import default_config, share, validation
from hamu_jax.config.fields import FIELDS, SECTIONS
from hamu_jax.config.help import help_text
from hamu_jax.config.hyperparameters import traced_fields
from hamu_jax.config.readers import value_of
from hamu_jax.engine import methods
from hamu_jax.errors import UserError


def make(**values):
  """A configuration on the digits with some fields, `__` for the dots."""
  config = default_config()
  config.data.update(source="digits", name="", mean=(0.5,), std=(0.5,))
  for name, value in values.items():
    *sections, field = name.split("__")
    place = config
    for section in sections:
      place = place[section]
    place[field] = value
  return config


def make_texts(**values):
  """`make`, of a language model."""
  source = values.pop("data__source", "authors")
  config = make(model__name="llama", train__select="last", **values)
  config.data.update(source=source, mean=FIELDS["data.mean"].default, std=FIELDS["data.std"].default)
  return config


def test_fields_are_those_of_the_default_configuration():
  config = default_config()
  for name, field in FIELDS.items():
    assert value_of(config, name) == field.default, name
    field.kind.check(name, field.default)
  assert sum(len(section.fields) for section in SECTIONS) == len(FIELDS)
  for section in SECTIONS:
    assert all(field.section == section.name for field in section.fields), section.name


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_explained_in_a_sentence(name):
  about = FIELDS[name].about
  assert about.endswith(".") and len(about) < 220
  assert f"--config.{name}=" in help_text()


def test_help_fits_a_terminal():
  lines = [line for line in help_text().splitlines() if not line.lstrip().startswith("--config")]
  assert max(map(len, lines)) <= 100


def test_every_declared_hyperparameter_is_a_field_that_its_methods_read():
  for name, method in methods.METHODS.items():
    for field in method.reads:
      assert f"method.{field}" in FIELDS, (name, field)
  # And none is left that no method reads.
  read = frozenset().union(*(method.reads for method in methods.METHODS.values()))
  own = re.compile("by the methods")
  for name, field in FIELDS.items():
    if own.search(field.reader.says()):
      assert name.removeprefix("method.") in read, name


def test_data_of_a_step_are_named():
  names = set(traced_fields())
  assert {"method.constraint", "train.optimizer.learning_rate", "sam.rho", "method.clip_norm"} <= names
  assert not any(name.endswith("epochs") and "l1" not in name for name in names)


UNREAD = {
  "method.alpha with gdiff": ({"method__name": "gdiff", "method__alpha": 0.5}, "by the methods scrub"),
  "method.temperature with ft": (
    {"method__name": "ft", "method__temperature": 2.0},
    "by the methods scrub_distill",
  ),
  "data.forget_class with random": (
    {"data__forget": "random", "data__forget_class": (3,)},
    "if config.data.forget is 'class' or 'class_size' or 'hard_probability'",
  ),
  "sam.mode without sam.rho": ({"sam__mode": "max"}, "if config.sam.rho is set"),
  "method.constraint_ratio with constraint": (
    {"method__constraint": 1e-5, "method__constraint_ratio": 0.3},
    "if config.method.constraint is not set",
  ),
  "method.epochs with retrain": ({"method__name": "retrain", "method__epochs": 3.0}, "all methods but those"),
  "train.epochs with imported weights": (
    {"model__weights": __file__, "retrain": False, "train__epochs": 3},
    "if a model is pretrained or retrained",
  ),
  "text.template on images": ({"text__template": "none"}, "by experiments on language models"),
  "devices without pmap": ({"devices": 2}, "if config.pairing is 'pmap'"),
  "memorization.models without an estimate": (
    {"memorization__models": 9},
    "config.data.scores is 'estimate'",
  ),
  "sam.scope in training alone": (
    {"sam__train_rho": 0.1, "sam__scope": "role"},
    "if config.sam.rho is set",
  ),
  "sam.scope with one role": (
    {"method__name": "ft", "sam__rho": 0.1, "sam__scope": "role"},
    "by methods that take a step on both roles",
  ),
  "memorization.evaluate_epochs with an estimate": (
    {"data__forget": "memorization", "data__scores": "estimate", "memorization__evaluate_epochs": 1.0},
    "it is read by nothing",
  ),
  "mask.scope without a mask": ({"mask__scope": "gradient"}, "if config.mask.fraction is set"),
  "evaluate.membership_size without attacks": (
    {"evaluate__membership_size": 9},
    "if config.evaluate.membership is set",
  ),
  "wandb.name without a project": ({"wandb__name": "mine"}, "if config.wandb.project is set"),
  "method.optimizer.decay_factor under a constant rate": (
    {"method__optimizer__decay_factor": 0.5},
    "if config.method.optimizer.schedule is 'step'",
  ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_a_value_that_nothing_reads_is_refused(case):
  values, reader = UNREAD[case]
  name = case.split(" ")[0]
  config = make(**values)
  with pytest.raises(UserError, match=re.escape(f"config.{name}=")) as error:
    validation.validate(config)
  message = str(error.value)
  assert reader in message and "nothing reads it here" in message and "\n" not in message
  share(config, name)
  validation.validate(config)
  # What the command line sets is meant to have an effect.
  with pytest.raises(UserError, match="nothing reads it here"):
    validation.validate(config, [name])


UNREAD_OF_TEXTS = {
  "data.seed of all rows": ({"data__source": "tofu", "data__seed": 1}, "if texts are drawn"),
  "text.question_key of plain texts": (
    {"data__source": "text", "text__question_key": "ask"},
    "if config.data.source is none of 'text'",
  ),
}


@pytest.mark.parametrize("case", UNREAD_OF_TEXTS)
def test_a_value_that_nothing_reads_is_refused_of_texts(case):
  values, reader = UNREAD_OF_TEXTS[case]
  with pytest.raises(UserError, match=re.escape(f"config.{case.split(' ')[0]}=")) as error:
    validation.validate(make_texts(**values))
  assert reader in str(error.value)


def test_an_own_source_may_read_every_field_of_a_request(monkeypatch):
  monkeypatch.setitem(data.SOURCES, "own", lambda request: None)
  own = {"name": "mine", "path": "a", "subset": "b", "image_key": "c", "label_key": "d", "test_split": "e"}
  validation.validate(make(**{f"data__{name}": value for name, value in ({"source": "own"} | own).items()}))


@pytest.mark.parametrize(
  "values",
  [
    # Pretraining goes by pieces, too, see `language.adapter.Adapted.microbatch`.
    {"method__name": "retrain", "method__microbatch": 2},
    {"data__source": "question_answer", "data__name": "someone/questions"},
    {"data__source": "text", "data__name": "someone/texts"},
    {"data__source": "tofu", "data__seed": 1, "text__forget_size": 3},
    {"data__source": "authors", "data__seed": 1},
    # `validation` asks for the last model, whether or not one is trained.
    {"model__weights": __file__, "retrain": False},
  ],
)
def test_a_value_that_is_read_is_accepted_of_texts(values):
  validation.validate(make_texts(**values))


def test_the_default_may_be_said_and_emptiness_is_no_value():
  config = make(method__name="gdiff", data__forget_indices="")
  validation.validate(config, ["method.alpha", "data.forget_indices"])


def test_a_whole_section_can_be_shared():
  config = make(method__name="gdiff", method__alpha=0.5, method__beta=0.5)
  share(config, "method")
  validation.validate(config)
  config.shared = ("methods",)
  with pytest.raises(UserError, match="config.shared=.*'methods' is neither a field nor a section"):
    validation.validate(config)


WRONG = {float: "much", int: 1.5, str: 3, bool: "yes", tuple: 3}


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_another_type_is_one_line_with_the_name(name):
  kind = FIELDS[name].kind
  with pytest.raises(UserError, match=re.escape(f"config.{name}=")) as error:
    kind.check(f"config.{name}", WRONG[kind.type])
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("data.std", ("a",)),
    ("data.mean", (float("nan"),)),
    ("mask.fractions", (2.0,)),
    ("train.optimizer.decay_epochs", (-1.0,)),
    ("data.forget_class", (-1,)),
    ("text.suites", (1,)),
    ("seed", 2**31),
    ("method.optimizer.momentum", float("inf")),
    ("language.lora.targets", ("head",)),
    ("model.stages", (0,)),
  ],
)
def test_elements_and_bounds_are_checked(name, value):
  with pytest.raises(UserError, match=re.escape(f"config.{name}=")):
    FIELDS[name].kind.check(f"config.{name}", value)


NEVER_REACHED = {
  "method.optimizer.warmup_epochs": (
    {"method__epochs": 2.0, "method__optimizer__warmup_epochs": 3.0},
    "at most",
  ),
  "train.optimizer.decay_epochs": (
    {"train__optimizer__schedule": "step", "train__optimizer__decay_epochs": (50.0,)},
    "must be below config.train.epochs=50",
  ),
  "method.repeats": ({"method__epochs": 2.0, "method__repeats": 3}, "at most config.method.epochs=2"),
  "method.optimizer.nesterov": ({"method__optimizer__nesterov": True}, "changes nothing without momentum"),
  "data.forget_indices": ({"data__forget": "indices"}, "give a file of example numbers"),
  "distributed.process_id": (
    {"distributed__coordinator": "host:1", "distributed__num_processes": 2, "distributed__process_id": 2},
    "must be below config.distributed.num_processes=2",
  ),
}


@pytest.mark.parametrize("name", NEVER_REACHED)
def test_values_that_another_makes_pointless_are_refused(name):
  values, message = NEVER_REACHED[name]
  with pytest.raises(UserError, match=f"config.{name}=.*{message}"):
    validation.validate(make(**values))
