"""Texts for language models to keep and to forget.

`load` reads the splits of one of the sources in `text_sources`, checks every text, draws rows and
adds duplicates.
"""

import collections
import difflib
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hamu_jax.data import split_rows
from hamu_jax.data.split_rows import Part
from hamu_jax.data.text_sources import DUPLICATES, PARAPHRASED, PERTURBED, TEXT_SOURCES, Request, Shelf
from hamu_jax.data.text_tables import Table, cells, length
from hamu_jax.errors import UserError

ROLES = ("retain", "forget", "test")
# Columns that name the owner of a text, in order of preference.
OWNERS = ("owner", "author")


class TextSplit(NamedTuple):
  """Texts in the order of the source, each an answer to a prompt."""

  prompts: tuple[str, ...]  # "" for a text without a prompt
  answers: tuple[str, ...]
  paraphrased: tuple[str, ...] | None  # the right answers in other words
  perturbed: tuple[tuple[str, ...], ...] | None  # wrong answers, the same number for each text
  owners: tuple[str, ...] | None  # the owner of each text, or the key of its watermark


class TextDataset(NamedTuple):
  """The texts of each role, and further splits to evaluate on."""

  splits: dict[str, TextSplit]  # "retain", "forget", "test" (if there is one) and the suites
  fingerprint: str  # sha256 of all splits, in hexadecimal


def load(
  source: str,
  *,
  name: str = "",
  path: str = "",
  subset: str = "",
  question_key: str = "question",
  answer_key: str = "answer",
  retain_split: str = "",
  forget_split: str = "forget",
  test_split: str = "",
  suites: tuple[str, ...] = (),
  duplicates: str = "none",
  retain_size: int = 0,
  forget_size: int = 0,
  test_size: int = 0,
  seed: int = 0,
) -> TextDataset:
  """Loads the texts of each role.

  A split is given by its name and, optionally, rows of it, in the notation of `datasets`:
  "forget10[300:400]", "train[:10%]", "train[-50:]", "retain90+holdout10". The arguments are the fields of
  `config.text` that describe a dataset.

  Args:
    source: a key of `TEXT_SOURCES`.
    name: hub id; empty for the published one of `tofu` and `waterdrum`.
    path: a local folder, or file, to read instead.
    subset: configuration of a hub dataset, or subfolder of a local one.
    question_key: column of the prompts; empty for texts without prompts. `text` does not read it.
    answer_key: column of the answers, or of the texts.
    retain_split: rows of the retain set; empty for all rows of the dataset that are not in `forget_split`.
    forget_split: rows of the forget set.
    test_split: texts that are never trained on; empty for none.
    suites: further splits to evaluate on, such as TOFU's "real_authors" and "retain_perturbed".
    duplicates: "none", "exact" or "semantic": which duplicates of the forget set are appended to the retain
      set. They are the source's own splits of duplicates (`waterdrum`), or else the forget set itself
      (exact) or with its paraphrased answers (semantic).
    retain_size: number of rows of `retain_split` to draw, 0 for all. They keep their order, and a smaller
      draw lies within a larger one.
    forget_size: the same for `forget_split`.
    test_size: the same for `test_split`.
    seed: seed of the draws, and of the generated authors.

  Returns:
    The dataset.

  Raises:
    UserError: one line, for anything wrong with the request, the files or the network; for forget texts
      that are also in the retain set although `duplicates` is "none"; or for test texts that are in either.
  """
  _check_request(source, duplicates, test_split, test_size)
  shelf = TEXT_SOURCES[source](Request(name, path, subset, seed))
  reader = _Reader(shelf, question_key if shelf.prompted else "", answer_key)
  whole = _whole_splits(reader, retain_split, forget_split, test_split)
  _check_disjoint(whole, duplicates)
  rows = _drawn_rows(whole, {"retain": retain_size, "forget": forget_size, "test": test_size}, seed)
  splits = {
    role: _owned(_taken(whole[role], rows[role]), shelf.owners.get(role)) for role in ROLES if role in whole
  }
  if duplicates in shelf.duplicates:
    twins = reader.twins(forget_split, shelf.duplicates[duplicates], len(whole["forget"].answers))
    twins = _owned(_taken(twins, rows["forget"]), shelf.owners.get("retain"))
    splits["retain"] = _joined([splits["retain"], twins])
  elif duplicates != "none":
    splits["retain"] = _joined([splits["retain"], _copied(splits["forget"], duplicates)])
  _add_suites(splits, reader, suites)
  return TextDataset(splits, _fingerprint(splits))


def _check_request(source: str, duplicates: str, test_split: str, test_size: int) -> None:
  """Refuses an unknown source or kind of duplicates, and a test size without a test split."""
  if source not in TEXT_SOURCES:
    near = difflib.get_close_matches(source, TEXT_SOURCES, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UserError(f"config.data.source={source!r}{hint}: choose one of {', '.join(TEXT_SOURCES)}")
  if duplicates not in DUPLICATES:
    raise UserError(f"config.text.duplicates={duplicates!r}: choose one of {', '.join(DUPLICATES)}")
  if test_size and not test_split:
    raise UserError(
      f"config.text.test_size={test_size} needs config.text.test_split: name the split, or set the size to 0"
    )


class _Reader:
  """Reads splits of a source from the columns that the user named, and checks each text."""

  def __init__(self, shelf: Shelf, question_key: str, answer_key: str):
    self._shelf, self._question_key, self._answer_key = shelf, question_key, answer_key

  def split(self, spec: str, field: str) -> TextSplit:
    """Reads the rows that `spec` names, with their wrong answers if the source has any."""
    parts = split_rows.read(spec, self._shelf.table, field)
    return _joined([self._completed(part.name, self._texts(part, field), field) for part in parts])

  def suite(self, spec: str) -> TextSplit:
    """Reads rows to evaluate on, from NAME_perturbed if there is one, because it has all the answers."""

    def table(name: str, field: str) -> Table:
      found = self._shelf.perturbed(name)
      if found is not None and found[0] == f"{name}_perturbed":
        return found[1]
      return self._shelf.table(name, field)

    field = "config.text.suites"
    return _joined([self._texts(part, field) for part in split_rows.read(spec, table, field)])

  def rest(self, spec: str, forget: TextSplit) -> TextSplit:
    """Reads every row of the dataset that is not in the forget set."""
    field = "config.text.forget_split"
    nothing = UserError(
      f"config.text.retain_split='' means all rows but those of {field}={spec!r}, which leaves"
      " none here: name the split to retain"
    )
    parts = split_rows.read(spec, self._shelf.table, field)
    names = {part.name for part in parts}
    whole = self._shelf.whole or parts[0].name
    if names == {whole}:
      table = parts[0].table
      rows = np.setdiff1d(np.arange(length(table)), np.concatenate([part.rows for part in parts]))
      if not len(rows):
        raise nothing
      part = Part(whole, table, rows)
      return self._completed(whole, self._texts(part, field), field)
    if not self._shelf.whole:
      raise UserError(
        f"config.text.retain_split='' cannot be told from {field}={spec!r}, of several splits:"
        " name the split to retain"
      )
    full = self.split(whole, "config.text.retain_split (empty, so all rows of the dataset)")
    pairs, forgotten = _pairs(full), set(_pairs(forget))
    if missing := forgotten - set(pairs):
      raise UserError(
        f"config.text.retain_split='' means all rows but those of {field}={spec!r}, but"
        f" {len(missing)} of these are not in the source's split {whole!r}: name the split to"
        " retain"
      )
    kept = [row for row, pair in enumerate(pairs) if pair not in forgotten]
    if not kept:
      raise nothing
    return _taken(full, kept)

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
    found = self._shelf.perturbed(name)
    if split.perturbed is not None or found is None:
      return split
    other, table = found
    extra = self._texts(Part(other, table, np.arange(length(table))), field)
    by_pair = {pair: row for row, pair in enumerate(_pairs(extra))}
    # The answers may differ in punctuation, so a question that is asked once is matched without its answer.
    asked = collections.Counter(extra.prompts)
    by_prompt = {prompt: row for row, prompt in enumerate(extra.prompts) if asked[prompt] == 1}
    rows: list[Any] = [by_pair.get(pair, by_prompt.get(pair[0])) for pair in _pairs(split)]
    if None in rows:
      if other != f"{name}_perturbed":
        return split  # retain_perturbed has only some rows of retain90.
      missing = split.prompts[rows.index(None)]
      raise UserError(
        f"{field}: {missing!r} of {name!r} is not among the questions of {other!r}, which must"
        " have wrong answers for all of them"
      )
    extra = _taken(extra, rows)
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


def _whole_splits(
  reader: _Reader, retain_split: str, forget_split: str, test_split: str
) -> dict[str, TextSplit]:
  """Reads the split of each role, before rows are drawn."""
  whole = {"forget": reader.split(forget_split, "config.text.forget_split")}
  if retain_split:
    whole["retain"] = reader.split(retain_split, "config.text.retain_split")
  else:
    whole["retain"] = reader.rest(forget_split, whole["forget"])
  if test_split:
    whole["test"] = reader.split(test_split, "config.text.test_split")
  return whole


def _add_suites(splits: dict[str, TextSplit], reader: _Reader, suites: Sequence[str]) -> None:
  """Reads further splits, whose names must differ from those of the roles."""
  for suite in suites:
    key = suite.split("[")[0]
    if key in splits:
      raise UserError(
        f"config.text.suites: {suite!r} would be the second split named {key!r}; leave it out, because the"
        " splits of the roles are always evaluated"
      )
    splits[key] = reader.suite(suite)


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


def _pairs(split: TextSplit) -> list[tuple[str, str]]:
  return list(zip(split.prompts, split.answers, strict=True))


def _taken(split: TextSplit, rows: np.ndarray | Sequence[int]) -> TextSplit:
  return TextSplit._make(None if values is None else tuple(values[row] for row in rows) for values in split)


def _owned(split: TextSplit, owner: str | None) -> TextSplit:
  """Fills in the owner of all texts, if no column names it."""
  if owner is None or split.owners is not None:
    return split
  return split._replace(owners=(owner,) * len(split.answers))


def _joined(splits: list[TextSplit]) -> TextSplit:
  """Concatenates splits; fields that one of them lacks and wrong answers of unequal number are dropped."""
  if len({len(split.perturbed[0]) for split in splits if split.perturbed}) > 1:
    splits = [split._replace(perturbed=None) for split in splits]
  return TextSplit._make(None if None in values else sum(values, ()) for values in zip(*splits, strict=True))


def _copied(forget: TextSplit, duplicates: str) -> TextSplit:
  """Makes duplicates of the forget set for a source that publishes none."""
  if duplicates == "exact":
    return forget
  if forget.paraphrased is None:
    raise UserError(
      "config.text.duplicates='semantic': the forget set has no paraphrased answers here; choose"
      " 'exact', or a source that has them (authors, tofu with forget10_perturbed, waterdrum)"
    )
  return forget._replace(answers=forget.paraphrased)


def _drawn_rows(whole: dict[str, TextSplit], sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
  """Draws the rows of each role."""
  return {
    role: _drawn(len(split.answers), sizes[role], seed, f"config.text.{role}_size")
    for role, split in whole.items()
  }


def _drawn(count: int, size: int, seed: int, field: str) -> np.ndarray:
  """Draws rows, in ascending order; 0 keeps all of them."""
  if not 0 <= size <= count:
    raise UserError(f"{field}={size}: choose 1..{count}, or 0 for the whole split")
  rows = np.random.default_rng(seed).permutation(count)
  return np.sort(rows[: size or count])


def _check_disjoint(splits: dict[str, TextSplit], duplicates: str) -> None:
  """Refuses texts that are in two roles, because no metric could tell them apart."""
  checks = [("test", "retain"), ("test", "forget")] if "test" in splits else []
  if duplicates == "none":
    checks.append(("forget", "retain"))
  for one, other in checks:
    others = set(_pairs(splits[other]))
    common = [row for row, pair in enumerate(_pairs(splits[one])) if pair in others]
    if common:
      remedy = ", or ask for them with config.text.duplicates" if one == "forget" else ""
      raise UserError(
        f"config.text.{one}_split: {len(common)} of its rows are also in the {other} set, the"
        f" first is row {common[0]} ({' '.join(splits[one].answers[common[0]].split())[:60]!r});"
        f" name splits that share none{remedy}"
      )


def _fingerprint(splits: dict[str, TextSplit]) -> str:
  """Hashes everything that training and evaluation read; the hash is the same on every platform."""
  return hashlib.sha256(json.dumps(splits).encode()).hexdigest()
