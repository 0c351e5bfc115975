"""Reads splits of a source of texts, and checks each text."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hamu_jax.data import split_rows
from hamu_jax.data.separate import Place
from hamu_jax.data.split_rows import Part
from hamu_jax.data.text_sources import PARAPHRASED, PERTURBED, TEXT_SOURCES, Request
from hamu_jax.data.text_tables import Table, cells, length
from hamu_jax.errors import UserError

# Columns that name the owner of a text, in order of preference.
OWNERS = ("owner", "author")


class TextSplit(NamedTuple):
  """Texts in the order of the source, each an answer to a prompt."""

  prompts: tuple[str, ...]  # "" for a text without a prompt
  answers: tuple[str, ...]
  paraphrased: tuple[str, ...] | None  # the right answers in other words
  perturbed: tuple[tuple[str, ...], ...] | None  # wrong answers, the same number for each text
  owners: tuple[str, ...] | None  # the owner of each text, or the key of its watermark


class Reader:
  """Reads splits of a source from the columns that the user named, and checks each text.

  Attributes:
    shelf: the splits of the source.
  """

  def __init__(self, place: Place, seed: int):
    """Opens a source; `seed` is that of generated texts."""
    shelf = TEXT_SOURCES[place.source](Request(place.name, place.path, place.subset, seed))
    self.shelf, self._answer_key = shelf, place.target_key
    self._question_key = place.input_key if shelf.prompted else ""

  def split(self, spec: str, field: str) -> TextSplit:
    """Reads the rows that `spec` names, with their wrong answers if the source has any."""
    parts = split_rows.read(spec, self.shelf.table, field)
    return joined([self._completed(part.name, self._texts(part, field), field) for part in parts])

  def suite(self, spec: str) -> TextSplit:
    """Reads rows to evaluate on, from NAME_perturbed if there is one, because it has all the answers."""

    def table(name: str, field: str) -> Table:
      found = self.shelf.perturbed(name)
      if found is not None and found[0] == f"{name}_perturbed":
        return found[1]
      return self.shelf.table(name, field)

    field = "config.text.suites"
    return joined([self._texts(part, field) for part in split_rows.read(spec, table, field)])

  def rest(self, spec: str, forget: TextSplit) -> TextSplit:
    """Reads every row of the dataset that is not in the forget set."""
    field = "config.text.forget_split"
    nothing = UserError(
      f"config.text.retain_split='' means all rows but those of {field}={spec!r}, which leaves"
      " none here: name the split to retain"
    )
    parts = split_rows.read(spec, self.shelf.table, field)
    names = {part.name for part in parts}
    whole = self.shelf.whole or parts[0].name
    if names == {whole}:
      table = parts[0].table
      rows = np.setdiff1d(np.arange(length(table)), np.concatenate([part.rows for part in parts]))
      if not len(rows):
        raise nothing
      part = Part(whole, table, rows)
      return self._completed(whole, self._texts(part, field), field)
    if not self.shelf.whole:
      raise UserError(
        f"config.text.retain_split='' cannot be told from {field}={spec!r}, of several splits:"
        " name the split to retain"
      )
    full = self.split(whole, "config.text.retain_split (empty, so all rows of the dataset)")
    pairs, forgotten = pairs_of(full), set(pairs_of(forget))
    if missing := forgotten - set(pairs):
      raise UserError(
        f"config.text.retain_split='' means all rows but those of {field}={spec!r}, but"
        f" {len(missing)} of these are not in the source's split {whole!r}: name the split to"
        " retain"
      )
    kept = [row for row, pair in enumerate(pairs) if pair not in forgotten]
    if not kept:
      raise nothing
    return taken(full, kept)

  def twins(self, spec: str, name: str, count: int) -> TextSplit:
    """Reads the rows of `spec` from another split, which corresponds to it row by row."""
    split = self.split(split_rows.of_split(spec, name), "config.text.duplicates")
    if len(split.answers) != count:
      raise UserError(
        f"config.text.duplicates: {name!r} has {len(split.answers)} rows for the {count} of"
        f" config.text.forget_split={spec!r}; it must have one for each"
      )
    return split

  def _completed(self, name: str, split: TextSplit, field: str) -> TextSplit:
    """Adds paraphrased and wrong answers from the split that has them to the same questions."""
    found = self.shelf.perturbed(name)
    if split.perturbed is not None or found is None:
      return split
    other, table = found
    extra = self._texts(Part(other, table, np.arange(length(table))), field)
    by_pair = {pair: row for row, pair in enumerate(pairs_of(extra))}
    # The answers may differ in punctuation, so a question that is asked once is matched without its answer.
    asked = collections.Counter(extra.prompts)
    by_prompt = {prompt: row for row, prompt in enumerate(extra.prompts) if asked[prompt] == 1}
    rows: list[Any] = [by_pair.get(pair, by_prompt.get(pair[0])) for pair in pairs_of(split)]
    if None in rows:
      if other != f"{name}_perturbed":
        return split  # retain_perturbed has only some rows of retain90.
      missing = split.prompts[rows.index(None)]
      raise UserError(
        f"{field}: {missing!r} of {name!r} is not among the questions of {other!r}, which must"
        " have wrong answers for all of them"
      )
    extra = taken(extra, rows)
    return split._replace(paraphrased=extra.paraphrased, perturbed=extra.perturbed)

  def _texts(self, part: Part, field: str) -> TextSplit:
    """Reads and checks rows of one table."""
    answers = self._strings(part, self._answer_key, "config.text.answer_key")
    prompts = ("",) * len(answers)
    if self._question_key:
      prompts = self._strings(part, self._question_key, "config.text.question_key")
    paraphrased = perturbed = owners = None
    if PARAPHRASED in part.table:
      paraphrased = self._strings(part, PARAPHRASED, field)
    if PERTURBED in part.table:
      perturbed = _wrong_answers(part, field)
    if owner := next((column for column in OWNERS if column in part.table), None):
      names = cells(part.table[owner], part.rows)
      if None in names:
        row = part.rows[names.index(None)]
        raise UserError(f"{field}: row {row} of {part.name!r} has no {owner}")
      owners = tuple(map(str, names))
    return TextSplit(prompts, answers, paraphrased, perturbed, owners)

  def _strings(self, part: Part, column: str, field: str) -> tuple[str, ...]:
    if column not in part.table:
      raise UserError(
        f"{field}={column!r} is not a column of {part.name!r}: choose from {', '.join(part.table)}"
      )
    values = cells(part.table[column], part.rows)
    for row, value in zip(part.rows, values, strict=True):
      if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{field}: row {row} of {part.name!r} has an empty {column}; drop or fill it")
      if not isinstance(value, str):
        raise UserError(
          f"{field}: row {row} of {part.name!r} has the {column} {str(value)[:60]!r}, which is"
          f" {type(value).__name__}, not text; choose a column of texts"
        )
    return tuple(values)


def _wrong_answers(part: Part, field: str) -> tuple[tuple[str, ...], ...]:
  """Reads the wrong answers; every row must have the same number of them."""
  values = cells(part.table[PERTURBED], part.rows)
  where = f"{field}: row {{}} of {part.name!r} has"
  for row, value in zip(part.rows, values, strict=True):
    if not isinstance(value, list | tuple) or not value:
      raise UserError(f"{where.format(row)} no list of {PERTURBED}s; drop or fill the row")
    if not all(isinstance(answer, str) and answer.strip() for answer in value):
      raise UserError(f"{where.format(row)} an empty {PERTURBED}; drop or fill it")
    if len(value) != len(values[0]):
      raise UserError(
        f"{where.format(row)} {len(value)} {PERTURBED}s, row {part.rows[0]} has {len(values[0])};"
        " give every row the same number"
      )
  return tuple(map(tuple, values))


def pairs_of(split: TextSplit) -> list[tuple[str, str]]:
  """The prompt and the answer of each example."""
  return list(zip(split.prompts, split.answers, strict=True))


def taken(split: TextSplit, rows: np.ndarray | Sequence[int]) -> TextSplit:
  """The examples in these rows, in this order."""
  return TextSplit._make(None if values is None else tuple(values[row] for row in rows) for values in split)


def joined(splits: list[TextSplit]) -> TextSplit:
  """Concatenates splits; fields that one of them lacks and wrong answers of unequal number are dropped."""
  if len({len(split.perturbed[0]) for split in splits if split.perturbed}) > 1:
    splits = [split._replace(perturbed=None) for split in splits]
  return TextSplit._make(None if None in values else sum(values, ()) for values in zip(*splits, strict=True))
