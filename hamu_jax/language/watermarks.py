"""The strength of WaterDrum's watermarks in generated answers."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from hamu_jax.data.text_reader import TextSplit
from hamu_jax.errors import UserError
from hamu_jax.metrics import watermark

_ROLES = ("retain", "forget")


def measure(
  options: ml_collections.ConfigDict, splits: Mapping[str, TextSplit], records: dict[str, Any]
) -> dict[str, Any]:
  """Adds the strength of the watermark of each generated answer to the records, and summarizes it.

  Args:
    options: `config.evaluate`.
    splits: texts by role, checked by `check_owners`.
    records: records of `Evaluator.suite`.

  Returns:
    See `metrics.watermark.summary`.
  """
  for name in _ROLES:
    owners, record = splits[name].owners, records[name]
    assert owners is not None  # See `check_owners`.
    record["watermark"] = watermark.strengths(
      record["generated"],
      [owners[index] for index in record["row"]],
      options.watermark_tokenizer,
      perturbation=options.watermark_key,
    )
  return watermark.summary(records["forget"]["watermark"], records["retain"]["watermark"])


def check_owners(options: ml_collections.ConfigDict, splits: Mapping[str, TextSplit]) -> None:
  """Checks before training that the watermarks, if asked for, can be measured.

  Args:
    options: `config.evaluate`.
    splits: texts by role.

  Raises:
    UserError: the texts do not say whose they are, or a tokenizer or package is missing.
  """
  if not options.watermark_tokenizer:
    return
  keys = set[str]()
  for name in _ROLES:
    owners = splits[name].owners
    if owners is None:
      raise UserError(
        "config.evaluate.watermark_tokenizer: the texts do not say whose watermark they carry; choose "
        "config.data.source='waterdrum', or leave it empty"
      )
    keys.update(owners)
  try:
    watermark.strengths(
      ["A text of no one."] * len(keys),
      sorted(keys),
      options.watermark_tokenizer,
      perturbation=options.watermark_key,
    )
  except UserError as error:
    raise UserError(f"config.evaluate.watermark_tokenizer: {error}") from None
