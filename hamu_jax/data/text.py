"""Texts for language models to keep and to forget.

`load` reads the splits of one of the sources in `text_sources`, checks every text, draws rows and
adds duplicates.
"""

import difflib
import hashlib
import json
import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hamu_jax.data import separate
from hamu_jax.data.separate import Place
from hamu_jax.data.text_reader import Reader, TextSplit, joined, pairs_of, taken
from hamu_jax.data.text_sources import DUPLICATES, TEXT_SOURCES
from hamu_jax.errors import UserError

ROLES = ("retain", "forget", "test")


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
  duplicate_split: str = "",
  sets: Mapping[str, Place] = types.MappingProxyType({}),
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
    duplicate_split: rows that are appended to the retain set, after the check that it shares none with the
      forget set; empty for none.
    sets: {role of `separate.ROLES`: its own place}. A split of that role is one of its dataset.

  Returns:
    The dataset.

  Raises:
    UserError: one line, for anything wrong with the request, the files or the network; for forget texts
      that are also in the retain set although `duplicates` is "none"; or for test texts that are in either.
  """
  _check_request(source, duplicates, test_split, test_size)
  readers = _readers(Place(source, name, path, subset, question_key, answer_key), sets, seed)
  whole = _whole_splits(readers, retain_split, forget_split, test_split)
  _check_disjoint(whole, duplicates)
  rows = _drawn_rows(whole, {"retain": retain_size, "forget": forget_size, "test": test_size}, seed)
  splits = {
    role: _owned(taken(whole[role], rows[role]), readers[role], role) for role in ROLES if role in whole
  }
  reader = readers["forget"]
  if duplicates in reader.shelf.duplicates:
    twins = reader.twins(forget_split, reader.shelf.duplicates[duplicates], len(whole["forget"].answers))
    splits["retain"] = joined([splits["retain"], _owned(taken(twins, rows["forget"]), reader, "retain")])
  elif duplicates != "none":
    splits["retain"] = joined([splits["retain"], _copied(splits["forget"], duplicates)])
  if duplicate_split:
    near = _owned(_of_role(readers, "duplicate", duplicate_split), readers["duplicate"], "retain")
    splits["retain"] = joined([splits["retain"], near])
  _add_suites(splits, readers["retain"], suites)
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


def _readers(place: Place, sets: Mapping[str, Place], seed: int) -> dict[str, Reader]:
  """A reader for each role; roles without a dataset of their own share that of the retain set."""
  readers = dict.fromkeys(("retain", *separate.ROLES), Reader(place, seed))
  for role, own in sets.items():
    if own.is_given:
      with separate.reading(role):
        readers[role] = Reader(own.within(place), seed)
  return readers


def _of_role(readers: dict[str, Reader], role: str, split: str) -> TextSplit:
  """Reads the split of a role from its dataset."""
  field = f"config.text.{role}_split"
  if readers[role] is readers["retain"]:
    return readers[role].split(split, field)
  with separate.reading(role):
    return readers[role].split(split, field)


def _whole_splits(
  readers: dict[str, Reader], retain_split: str, forget_split: str, test_split: str
) -> dict[str, TextSplit]:
  """Reads the split of each role, before rows are drawn."""
  whole = {"forget": _of_role(readers, "forget", forget_split)}
  if retain_split:
    whole["retain"] = _of_role(readers, "retain", retain_split)
  elif readers["forget"] is readers["retain"]:
    whole["retain"] = readers["retain"].rest(forget_split, whole["forget"])
  else:
    raise UserError(
      "config.text.retain_split='': the forget set is a dataset of its own, so there is no rest; name the"
      " split to retain"
    )
  if test_split:
    whole["test"] = _of_role(readers, "test", test_split)
  return whole


def _add_suites(splits: dict[str, TextSplit], reader: Reader, suites: Sequence[str]) -> None:
  """Reads further splits, whose names must differ from those of the roles."""
  for suite in suites:
    key = suite.split("[")[0]
    if key in splits:
      raise UserError(
        f"config.text.suites: {suite!r} would be the second split named {key!r}; leave it out, because the"
        " splits of the roles are always evaluated"
      )
    splits[key] = reader.suite(suite)


def _owned(split: TextSplit, reader: Reader, role: str) -> TextSplit:
  """Fills in the owner of all texts of a role, if no column names it."""
  owner = reader.shelf.owners.get(role)
  if owner is None or split.owners is not None:
    return split
  return split._replace(owners=(owner,) * len(split.answers))


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
    others = set(pairs_of(splits[other]))
    common = [row for row, pair in enumerate(pairs_of(splits[one])) if pair in others]
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
