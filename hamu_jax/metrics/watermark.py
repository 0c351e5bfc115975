"""WaterDrum: how much of the watermark that an owner's texts carry is in what the model writes.

Whoever was trained on watermarked texts writes watermarked texts; whoever has forgotten them, does
not. Unlike the loss, this compares with no retrained model and tells apart owners whose texts say
the same.

Source: WaterDrum (arXiv 2505.05064), with the watermark of Waterfall (arXiv 2407.04411) as the
package waterfall computes it.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hamu_jax.errors import UserError
from hamu_jax.metrics import membership

# Texts verified at a time. The package counts each over the whole vocabulary.
_BATCH = 256


def strengths(
  texts: Sequence[str], owners: Sequence[int | str], tokenizer: Any, *, perturbation: int = 1
) -> np.ndarray:
  r"""Strength of its owner's watermark in each text.

  .. math::
    q = \frac1{T - 1} \sum_{t=2}^{T} \cos\left(
      \frac{2 \pi k}{N} \, \pi_{\mu, w_{t-1}}(w_t)\right)

  with the text's tokens :math:`w_1, \dots, w_T` of the watermark's tokenizer, the number N of its
  tokens, a perturbation key k, and a permutation :math:`\pi` of all tokens that the owner's key
  :math:`\mu` and the previous token draw.

  Args:
    texts: N generated answers.
    owners: N watermark keys, whole numbers from 0: whose text each should be.
    tokenizer: of the model that wrote the watermarked texts, not of the one that is evaluated:
      a transformers tokenizer, or a folder or hub id of one. WaterDrum's is Llama 3.1's.
    perturbation: k. From N / 2 on the package has sines for cosines.

  Returns:
    [N] in [-1, 1], around 0 without the owner's watermark; 0 for texts of fewer than two tokens.

  Raises:
    UserError: the package waterfall is missing, the tokenizer cannot be loaded, a key is out of
      range, or the numbers of texts and owners differ.
  """
  if isinstance(texts, str) or len(texts) != len(owners):
    raise UserError(
      f"watermark: {'one text' if isinstance(texts, str) else f'{len(texts)} texts'} for "
      f"{len(owners)} owners; give a list of texts and as many owners"
    )
  if perturbation < 1:
    raise UserError(f"watermark: perturbation key {perturbation}: choose 1 or more")
  keys_N = np.array([_key(owner) for owner in owners], np.int64)
  watermarker = _watermarker(tokenizer, perturbation)
  strengths_N = np.zeros(len(texts))
  for key in np.unique(keys_N):
    rows = np.flatnonzero(keys_N == key)
    for start in range(0, len(rows), _BATCH):
      part = rows[start : start + _BATCH]
      # More texts than its batch size it would spread over forked processes, which JAX's threads
      # do not survive.
      scores = watermarker.verify(
        [texts[row] for row in part], id=[int(key)], k_p=[perturbation], batch_size=len(part)
      )
      strengths_N[part] = scores[:, 0, 0]
  return strengths_N


def summary(forget: ArrayLike, retain: ArrayLike) -> dict[str, float]:
  """How much of the watermarks is left, and whether the sets differ in it.

  Args:
    forget: [n] `strengths` of answers to the forget owners' prompts.
    retain: [m] the same for the retain set.

  Returns:
    ``forget`` and ``retain``, mean strengths, and ``forget_retain_auc``, the probability that a
    random retain answer carries the stronger watermark: 0.5 if nothing was forgotten, 1 if the
    forget owners' watermarks are gone.

  Raises:
    UserError: one of the sets is empty.
  """
  auc = membership.loss_auc(forget, retain)
  return {
    "forget": float(np.mean(np.asarray(forget))),
    "retain": float(np.mean(np.asarray(retain))),
    "forget_retain_auc": auc,
  }


def _key(owner: int | str) -> int:
  try:
    key = int(owner)
  except ValueError:
    key = -1
  if not 0 <= key < 2**32:
    raise UserError(f"watermark: owner {owner!r} is no watermark key; give whole numbers from 0 to 2^32 - 1")
  return key


def _watermarker(tokenizer, perturbation):
  """The package's `Watermarker`, without a model."""
  try:
    from waterfall.WatermarkerBase import Watermarker
  except ImportError as error:
    raise UserError(
      "WaterDrum needs waterfall, which is not installed; pip install 'hamu-jax[waterfall]'"
    ) from error
  # It sets the padding token of the tokenizer that it is given.
  tokenizer = tokenizer if isinstance(tokenizer, str) else copy.deepcopy(tokenizer)
  try:
    return Watermarker(tokenizer=tokenizer, k_p=perturbation)
  except (OSError, ValueError) as error:
    raise UserError(
      f"watermark: tokenizer {tokenizer!r} cannot be loaded ({error}); give the folder or hub id "
      "of the tokenizer that the texts were watermarked with"
    ) from error
