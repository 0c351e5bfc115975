"""A row of the table of fields, and rows that several sections share."""

from typing import Any, NamedTuple

from hamu_jax import data
from hamu_jax.config.kinds import Choice, Count, Flag, Kind, Number, Several
from hamu_jax.config.readers import ALWAYS, Reader, is_one_of, is_unset
from hamu_jax.engine import optimizers
from hamu_jax.errors import UserError

# A run of more epochs would not end.
MOST_EPOCHS = 1_000_000
# Largest number of examples of a batch.
MOST_EXAMPLES = 10_000_000
# Bound of norms, coefficients and other numbers whose squares must be finite in 32 bits.
LARGE = 1e6
# A running average diverges at a rate of 1 or more.
_DECAY_RATE = Number(0, 1, open_high=True, optional=True)


class Field(NamedTuple):
  """One field of a configuration.

  Attributes:
    name: dotted, without "config".
    default: value where nothing sets it; None for an optional field.
    kind: values that it may hold.
    about: one sentence on its meaning.
    reader: condition under which it is read. A value that nothing reads is refused, unless it is the default
      or empty.
    traced: whether it enters a step as data, so that one compiled program serves all its values.
    incidental: whether it changes no result, so that a run directory may be resumed with another value.
    off_at_zero: whether 0 switches something off, so that 0 and other values are different programs.
  """

  name: str
  default: Any
  kind: Kind
  about: str
  reader: Reader = ALWAYS
  traced: bool = False
  incidental: bool = False
  off_at_zero: bool = False

  @property
  def section(self) -> str:
    """The name of its section; "" at the top level."""
    return self.name.rpartition(".")[0]

  def refusal(self, message: str) -> UserError:
    """The error for a value of this field: the message, and the default as a way out."""
    default = "" if self.default is None else f" for its default {self.default!r}"
    return UserError(f"{message}, or leave it out{default}")

  def check(self, value: Any) -> None:
    """Raises a one-line UserError unless the field may hold a value."""
    try:
      self.kind.check(f"config.{self.name}", value)
    except UserError as error:
      raise self.refusal(str(error)) from error


class Section(NamedTuple):
  """Fields that belong together.

  Attributes:
    name: dotted name; "" for the fields at the top level.
    about: one sentence on the purpose of its fields.
    fields: rows of the section.
  """

  name: str
  about: str
  fields: tuple[Field, ...]


def optimizer_section(owner: str, name: str, learning_rate: float, reader: Reader) -> Section:
  """The section `OWNER.optimizer`: an optax optimizer under a schedule."""
  prefix = f"{owner}.optimizer"
  scheduled = is_one_of(f"{prefix}.schedule", "step") & reader
  return Section(
    prefix,
    f"The optimizer of `{owner}` and its schedule.",
    (
      Field(f"{prefix}.name", name, Choice(optimizers.OPTIMIZERS), "An optimizer of optax.", reader),
      Field(
        f"{prefix}.learning_rate",
        learning_rate,
        # A smaller rate moves nothing in 32 bits.
        Number(1e-12, 1000),
        "Peak learning rate.",
        reader,
        traced=True,
      ),
      Field(
        f"{prefix}.schedule",
        "constant",
        Choice(optimizers.SCHEDULES),
        "Course of the rate: cosine and linear decay to 0, step takes `decay_factor`; see `optimizers`.",
        reader,
      ),
      Field(
        f"{prefix}.warmup_epochs", 0.0, Number(0, MOST_EPOCHS), "Epochs of a linear warm-up from 0.", reader
      ),
      Field(
        f"{prefix}.decay_epochs",
        (),
        Several(Number(0, MOST_EPOCHS, open_low=True), distinct=True),
        "Epochs at which the schedule step decays.",
        scheduled,
      ),
      Field(
        f"{prefix}.decay_factor",
        0.1,
        Number(0, 1000),
        "Factor of the rate at each of `decay_epochs`.",
        scheduled,
      ),
      Field(f"{prefix}.momentum", None, _DECAY_RATE, "Handed to the optimizer when set.", reader),
      Field(f"{prefix}.nesterov", None, Flag(optional=True), "Handed to the optimizer when set.", reader),
      Field(f"{prefix}.b1", None, _DECAY_RATE, "Handed to the optimizer when set.", reader),
      Field(f"{prefix}.b2", None, _DECAY_RATE, "Handed to the optimizer when set.", reader),
      Field(f"{prefix}.eps", None, Number(0, 1, optional=True), "Handed to the optimizer when set.", reader),
      Field(
        f"{prefix}.weight_decay",
        0.0,
        Number(0, 1000),
        "The optimizer's own if it has one, else added to the gradient.",
        reader,
      ),
    ),
  )


def training_fields(
  owner: str,
  reader: Reader,
  *,
  epochs: float,
  batch_size: int,
  batch_sizes: Kind = Count(1, MOST_EXAMPLES),
  clip_norm: float,
  evaluate_epochs: float,
  augments: Reader,
  evaluates: Reader | None = None,
  about_clip: str = "Largest norm of the gradient; 0 does not clip.",
) -> tuple[Field, ...]:
  """The fields that `train`, `memorization` and `method` have in common.

  Args:
    owner: name of the section.
    reader: condition under which they are read.
    epochs: default of `epochs`.
    batch_size: default of `batch_size`.
    batch_sizes: kind of `batch_size`.
    clip_norm: default of `clip_norm`.
    evaluate_epochs: default of `evaluate_epochs`.
    augments: condition under which `augment` is read.
    evaluates: condition under which `evaluate_epochs` is read; None for `reader`.
    about_clip: meaning of `clip_norm`.
  """
  return (
    Field(
      f"{owner}.epochs",
      epochs,
      Number(1e-6, MOST_EPOCHS),
      "Length in epochs.",
      reader,
      traced=True,
    ),
    Field(f"{owner}.batch_size", batch_size, batch_sizes, "Examples in a step, of each role.", reader),
    Field(
      f"{owner}.clip_norm", clip_norm, Number(0, LARGE), about_clip, reader, traced=True, off_at_zero=True
    ),
    Field(
      f"{owner}.augment",
      "none",
      Choice(data.AUGMENTATIONS),
      "Augmentation of the images.",
      augments,
    ),
    Field(
      f"{owner}.evaluate_epochs",
      evaluate_epochs,
      Number(0, MOST_EPOCHS),
      "Epochs between two evaluations; 0 evaluates the end alone.",
      reader if evaluates is None else evaluates,
    ),
  )


def only_if_unset(name: str, reader: Reader) -> Reader:
  """A field that is read where another field is None and `reader` holds."""
  return reader & is_unset(name)
