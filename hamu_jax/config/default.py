"""The default configuration, built from the table of fields, and functions that several modules share."""

import difflib

import ml_collections
from ml_collections import config_dict

from hamu_jax import data, models
from hamu_jax.config.fields import FIELDS, SECTIONS, Field
from hamu_jax.config.fields.field import optimizer_section
from hamu_jax.config.kinds import CountOrPair
from hamu_jax.config.readers import ALWAYS
from hamu_jax.data import separate
from hamu_jax.errors import UserError


def default_config() -> ml_collections.ConfigDict:
  """The paper's CIFAR-10 experiment (arXiv 2606.02119): ResNet-20, forget class 0, hamu-q."""
  config = ml_collections.ConfigDict()
  for section in SECTIONS:
    place = config
    for part in filter(None, section.name.split(".")):
      if part not in place:
        place[part] = ml_collections.ConfigDict()
      place = place[part]
    for field in section.fields:
      place[field.name.rpartition(".")[2]] = _initial(field)
  return config


def optimizer_config(name: str, learning_rate: float) -> ml_collections.ConfigDict:
  """An optimizer section under a constant rate, see the fields of `method.optimizer`.

  Args:
    name: name of an optax optimizer (sgd, adamw, lion, ...).
    learning_rate: peak learning rate.
  """
  fields = optimizer_section("method", name, learning_rate, ALWAYS).fields
  return ml_collections.ConfigDict({field.name.rpartition(".")[2]: _initial(field) for field in fields})


def share(config: ml_collections.ConfigDict, *names: str) -> None:
  """Declares that a configuration file sets some fields for those of its variants that read them.

  A value that nothing reads is refused. Values of these fields are ignored instead, unless the command line
  sets them.

  Args:
    config: `config.shared` is extended.
    names: fields or whole sections, without "config", such as "method.constraint_ratio" or "train".
  """
  config.shared = tuple(dict.fromkeys((*config.shared, *names)))


def _initial(field: Field):
  """The default value; for a field without one, a placeholder of its type."""
  if isinstance(field.kind, CountOrPair):
    # A pair is of another type than the default.
    return config_dict.FieldReference(field.default, field_type=object)
  return config_dict.placeholder(field.kind.type) if field.default is None else field.default


def build_model(config: ml_collections.ConfigDict, *, num_classes: int, platform: str | None = None):
  """Builds the model of `config.model`; see `models.build_model` for the other arguments."""
  options = {name: config[name] for name in ("width", "depth", "heads", "stages") if config[name] is not None}
  return models.build_model(config.name, num_classes=num_classes, platform=platform, **options)


def seed_of(config: ml_collections.ConfigDict, section: str) -> int:
  """The seed of the section `method` or `evaluate`, or the experiment's where it is not set."""
  own = config[section].seed
  return config.seed if own is None else own


def places(config: ml_collections.ConfigDict) -> dict[str, separate.Place]:
  """{role: place of its own dataset, by the fields of `config.data`}, without splits."""
  return {role: separate.Place(**config[f"{role}_set"]) for role in separate.ROLES}


def _places_of_images(config: ml_collections.ConfigDict) -> dict[str, separate.Place]:
  """The places of the roles that do not share the dataset of `config.data`."""
  own, found = places(config), {}
  if config.forget == "separate":
    found["forget"] = own["forget"]._replace(split=config.forget_split or "train")
    if config.duplicate_split:
      found["duplicate"] = own["duplicate"]._replace(split=config.duplicate_split)
  if own["test"].is_given:
    found["test"] = own["test"]._replace(split=config.test_split or "test")
  return found


def load_dataset(config: ml_collections.ConfigDict) -> data.Dataset:
  """Loads the dataset of `config.data`, and those of the roles that have their own."""
  return data.load(
    config.source,
    name=config.name,
    path=config.path,
    subset=config.subset,
    test_split=config.test_split,
    train_size=config.train_size,
    test_size=config.test_size,
    image_key=config.image_key,
    label_key=config.label_key,
    image_size=config.image_size,
    stream=config.stream,
    seed=config.seed,
    train_split=config.train_split,
    sets=_places_of_images(config),
  )


def incidental_fields() -> tuple[str, ...]:
  """Dotted names of the fields that change no result, so that a run may be resumed with other values."""
  return tuple(name for name, field in FIELDS.items() if field.incidental)


def is_incidental(name: str) -> bool:
  """Whether a field, by its dotted name without "config", changes no result."""
  return name in FIELDS and FIELDS[name].incidental


def field_names(config: ml_collections.ConfigDict, prefix: str = "config") -> list[str]:
  """Dotted names of all fields that hold a value."""
  names = []
  for key, value in config.items():
    name = f"{prefix}.{key}"
    names += field_names(value, name) if isinstance(value, ml_collections.ConfigDict) else [name]
  return names


def unknown_field(name: str) -> UserError:
  """The error for a field that the table does not declare.

  Args:
    name: dotted, with "config".
  """
  known = [f"config.{field}" for field in FIELDS]
  nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
  return UserError(f"{name}: no such field; the nearest is {nearest}")
