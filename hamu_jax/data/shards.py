"""Names of the files of a split: NAME.parquet, or its shards NAME-00000-of-00002.parquet, ..."""

import collections
import pathlib
import re
from collections.abc import Iterable

from hamu_jax.errors import UserError

# `datasets` once wrote a hash after the count.
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})(-[0-9a-f]{8,})?")

Files = dict[str, tuple[pathlib.Path, ...]]  # {split: its files in order}


def by_split(files: Iterable[pathlib.Path]) -> Files:
  """Groups files by the split that they belong to.

  The names "train" and "train_extra" are two splits.

  Args:
    files: paths of files.

  Returns:
    The files of each split, sorted by name.

  Raises:
    UserError: if one of several shards is missing, or the shards of a split are those of two datasets.
  """
  found: dict[str, list[pathlib.Path]] = collections.defaultdict(list)
  shards: dict[str, dict[pathlib.Path, re.Match]] = collections.defaultdict(dict)
  for file in sorted(files):
    shard = _SHARD.fullmatch(file.stem)
    split = shard["split"] if shard else file.stem
    found[split].append(file)
    if shard:
      shards[split][file] = shard
  for split, matches in shards.items():
    _check_complete(split, matches)
  return {split: tuple(paths) for split, paths in found.items()}


def _check_complete(split: str, matches: dict[pathlib.Path, re.Match]) -> None:
  folder = next(iter(matches)).parent
  numbers: dict[tuple[str, int], set[int]] = collections.defaultdict(set)
  for file, match in matches.items():
    numbers[file.suffix, int(match["count"])].add(int(match["number"]))
  if len(numbers) > 1:
    raise UserError(
      f"config.data.path='{folder}': the files {split}-*-of-* are shards of {len(numbers)} datasets"
      f" ({', '.join(sorted(file.name for file in matches)[:4])}, ...); keep the files of one"
    )
  (((_, count), there),) = numbers.items()
  if missing := sorted(set(range(count)) - there):
    raise UserError(
      f"config.data.path='{folder}': shard {missing[0]} of the {count} of {split!r} is missing"
      f" ({len(missing)} in all); download it again"
    )
