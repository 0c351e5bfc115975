"""The table of fields: every field of a configuration is one row, and is declared nowhere else.

The default configuration, validation, `--help`, the reference pages and the list of hyperparameters that are
data of a step are derived from it. To add a field, add a row to its section.
"""

import itertools

from hamu_jax.config.fields import data, language, method, run, training
from hamu_jax.config.fields.field import Field, Section

# In the order of --help and of the reference pages.
SECTIONS: tuple[Section, ...] = (
  *run.SECTIONS_BEFORE,
  *data.SECTIONS,
  *language.SECTIONS,
  *training.SECTIONS,
  *method.SECTIONS,
  *run.SECTIONS_AFTER,
)

# By dotted name without "config".
FIELDS: dict[str, Field] = {
  field.name: field for field in itertools.chain.from_iterable(section.fields for section in SECTIONS)
}

__all__ = ["FIELDS", "SECTIONS", "Field", "Section"]
