"""Where texts come from: one table of sources, each with its own names of splits.

A source is a function `(Request) -> Shelf`; adding one is one line in `TEXT_SOURCES`. None of them
unpickles or runs code that came with the data.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from hamu_jax.data import authors
from hamu_jax.data.huggingface import UnknownSubset
from hamu_jax.data.text_tables import (
  Table,
  Tables,
  chosen,
  file_tables,
  hub_configurations,
  hub_splits,
  local_files,
)
from hamu_jax.errors import UserError

DUPLICATES = ("none", "exact", "semantic")
# TOFU's names for a reworded right answer and for the list of wrong ones.
PARAPHRASED, PERTURBED = "paraphrased_answer", "perturbed_answer"


class Request(NamedTuple):
  """What the user asks of a source: the fields of `config.data` that sources read."""

  name: str
  path: str
  subset: str
  seed: int


class Shelf(NamedTuple):
  """The splits of a source under its own names, not yet checked."""

  # (name, config field that gives it) -> the whole split
  table: Tables
  # name -> name and table of the rows with wrong answers to that split's questions, if any
  perturbed: Callable[[str], tuple[str, Table] | None] = lambda name: None
  whole: str = ""  # name of the split of all rows; "" if splits are only given by row numbers
  duplicates: dict[str, str] = {}  # {kind of `DUPLICATES`: the split of the forget set's duplicates}
  owners: dict[str, str] = {}  # {role: owner of its texts}, for a source without a column of owners
  prompted: bool = True  # whether texts have prompts


def read_authors(request: Request) -> Shelf:
  """Generates fictitious authors, see `authors.generate`.

  Args:
    request: its `seed` chooses the authors; its `path` and `subset` must be empty.

  Returns:
    The splits "retain", "forget" and "test", and "full", which is "retain" followed by "forget".

  Raises:
    UserError: if a path or subset was given.
  """
  for field in ("path", "subset"):
    if value := getattr(request, field):
      raise UserError(
        f"config.data.{field}={value!r} has no meaning for the embedded authors: choose"
        " config.data.source for these texts, or leave it empty"
      )
  tables = {
    split: dict(zip(("question", "answer", PARAPHRASED, PERTURBED, "author"), rows, strict=True))
    for split, rows in authors.generate(request.seed).items()
  }
  tables["full"] = {key: tables["retain"][key] + tables["forget"][key] for key in tables["retain"]}
  return Shelf(functools.partial(chosen, tables, "config.data.source='authors'"), whole="full")


def read_tofu(request: Request) -> Shelf:
  """Reads TOFU, or a dataset with the same layout.

  Args:
    request: `name` is the hub id, empty for "locuslab/TOFU"; its configurations ("forget10",
      "retain90", "full", "holdout10", "real_authors", ...) are the splits. With a `path`, the splits are
      files: NAME.parquet, NAME.json or NAME.jsonl, or a folder NAME of train*.parquet.

  Returns:
    The splits. NAME_perturbed completes NAME with paraphrased and wrong answers. retain_perturbed
    completes any split whose rows are all among its 400 rows; evaluate on it as a suite.

  Raises:
    UserError: for a subset at the hub, or a missing dataset, folder or network.

  Source: P. Maini et al., arXiv 2401.06121; huggingface.co/datasets/locuslab/TOFU.
  """
  if request.path:
    files, where = local_files(request.path, request.subset, nested=True)
    table = file_tables(files, where)

    def optional(name: str) -> Table | None:
      return table(name, "") if name in files else None

  else:
    if request.subset:
      raise UserError(
        f"config.data.subset={request.subset!r} has no meaning for tofu at the hub, whose"
        " configurations are the splits: leave it empty"
      )
    table = hub_configurations(request.name or "locuslab/TOFU")

    def optional(name: str) -> Table | None:
      # The hub is asked only for configurations that TOFU has: without a network it cannot answer a guess.
      if not re.fullmatch(r"(forget\d*|retain|real_authors|world_facts)_perturbed", name):
        return None
      try:
        return table(name, "the configuration of wrong answers")
      except UnknownSubset:
        return None

  def perturbed(name: str) -> tuple[str, Table] | None:
    base = re.sub(r"^retain\d+$", "retain", name)
    for other in dict.fromkeys((f"{name}_perturbed", f"{base}_perturbed")):
      if found := optional(other):
        return other, found
    return None

  return Shelf(table, perturbed, whole="full")


def read_waterdrum(request: Request) -> Shelf:
  """Reads WaterDrum's watermarked TOFU.

  Its authors watermarked the forget set with key 1 and everything else, including the duplicates of the
  forget set, with key 0. No column of the dataset holds these keys.

  Args:
    request: `name` is the hub id, empty for "Glow-AI/WaterDrum-TOFU"; `subset` is "forget_01",
      "forget_05" or "forget_10" (the only one with duplicates), or one of these after
      "unwatermarked_". `path`, if not empty, is a folder of files; `subset` then names its subfolder.

  Returns:
    The splits "full", "retain", "forget" and, where the subset has them, "exact_duplicate" and
    "semantic_duplicate".

  Raises:
    UserError: for a missing dataset, subset, folder or network.

  Source: X. Lu et al., WaterDrum (arXiv 2505.05064).
  """
  shelf = read_any(request._replace(name=request.name or "Glow-AI/WaterDrum-TOFU"))
  marked = not request.subset.startswith("unwatermarked")
  return shelf._replace(
    whole="full",
    duplicates={kind: f"{kind}_duplicate" for kind in DUPLICATES[1:]},
    owners={"retain": "0", "forget": "1"} if marked else {},
  )


def read_any(request: Request) -> Shelf:
  """Reads any dataset with a column of answers and one of questions.

  Args:
    request: `name` is a hub id and `subset` its configuration. `path`, if not empty, is a file, whose one
      split is "train", or a folder. The folder, or its subfolder `subset` or "data", has files named after
      the splits, sharded or not.

  Returns:
    The splits.

  Raises:
    UserError: for a missing dataset, subset, folder or network.
  """
  if request.path:
    return Shelf(file_tables(*local_files(request.path, request.subset)))
  return Shelf(hub_splits(request.name, request.subset))


def read_text(request: Request) -> Shelf:
  """Reads the texts of any dataset without prompts; see `read_any`."""
  return read_any(request)._replace(prompted=False)


TEXT_SOURCES = {
  "authors": read_authors,
  "tofu": read_tofu,
  "waterdrum": read_waterdrum,
  "question_answer": read_any,
  "text": read_text,
}
