"""WaterDrum: how strongly the model's texts carry the watermark of an owner's texts.

A model that was trained on watermarked texts writes watermarked texts; one that has forgotten them does not.
Unlike the loss, this metric needs no retrained model and tells apart owners whose texts say the same.

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

# Number of texts that are verified at a time. The package counts each over the whole vocabulary.
_BATCH = 256


def strengths(
  texts: Sequence[str], owners: Sequence[int | str], tokenizer: Any, *, perturbation: int = 1
) -> np.ndarray:
  r"""Strength of the owner's watermark in each text.

  .. math::
    q = \frac1{T - 1} \sum_{t=2}^{T} \cos\left(
      \frac{2 \pi k}{N} \, \pi_{\mu, w_{t-1}}(w_t)\right)

  Here :math:`w_1, \dots, w_T` are the text's tokens under the watermark's tokenizer, N is the size of its
  vocabulary, k is a perturbation key, and :math:`\pi` is a permutation of the vocabulary that is drawn by the
  owner's key :math:`\mu` and the previous token.

  Args:
    texts: N generated answers.
    owners: N watermark keys, whole numbers from 0; the owner of each text.
    tokenizer: tokenizer of the model that wrote the watermarked texts, not of the model that is evaluated:
      a transformers tokenizer, or a folder or hub id of one. WaterDrum used Llama 3.1's.
    perturbation: k. From N / 2 on, the package uses sines instead of cosines.

  Returns:
    [N] in [-1, 1], about 0 without the owner's watermark; 0 for texts of fewer than two tokens.

  Raises:
    UserError: if the package waterfall is not installed, the tokenizer cannot be loaded, a key is out of
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
    indices = np.flatnonzero(keys_N == key)
    for start in range(0, len(indices), _BATCH):
      part = indices[start : start + _BATCH]
      # The package would spread more texts than its batch size over forked processes, which is unsafe with
      # JAX's threads.
      scores = watermarker.verify(
        [texts[index] for index in part], id=[int(key)], k_p=[perturbation], batch_size=len(part)
      )
      strengths_N[part] = scores[:, 0, 0]
  return strengths_N


def summary(forget: ArrayLike, retain: ArrayLike) -> dict[str, float]:
  """Mean strength of the watermarks in both sets, and how well it separates them.

  Args:
    forget: [n] `strengths` of answers to the forget owners' prompts.
    retain: [m] the same for the retain set.

  Returns:
    ``forget`` and ``retain``, the mean strengths, and ``forget_retain_auc``, the probability that a
    random retain answer has a stronger watermark than a random forget answer. It is 0.5 if nothing was
    forgotten, and 1 if the forget owners' watermarks are gone.

  Raises:
    UserError: if one of the sets is empty.
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
    raise UserError(
      f"watermark: owner {owner!r} is not a watermark key; give whole numbers from 0 to 2^32 - 1"
    )
  return key


def _watermarker(tokenizer, perturbation):
  """Builds the package's `Watermarker`, without a model."""
  try:
    from waterfall.WatermarkerBase import Watermarker
  except ImportError as error:
    raise UserError(
      "WaterDrum needs waterfall, which is not installed; pip install 'hamu-jax[waterfall]'"
    ) from error
  # `Watermarker` sets the padding token of its tokenizer, so it gets a copy.
  tokenizer = tokenizer if isinstance(tokenizer, str) else copy.deepcopy(tokenizer)
  try:
    return Watermarker(tokenizer=tokenizer, k_p=perturbation)
  except (OSError, ValueError) as error:
    raise UserError(
      f"watermark: tokenizer {tokenizer!r} cannot be loaded ({error}); give the folder or hub id "
      "of the tokenizer that the texts were watermarked with"
    ) from error
