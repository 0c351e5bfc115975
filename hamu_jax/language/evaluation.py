"""Evaluates a language model on every question of named splits.

Shapes: n evaluated questions, W wrong answers to each.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hamu_jax.language import suite
from hamu_jax.language.prediction import Predictions, Predictor
from hamu_jax.language.questions import Questions, all_texts, checked_texts, texts_of
from hamu_jax.metrics import membership, tofu
from hamu_jax.models.llama_config import LlamaConfig
from hamu_jax.models.tokenizer import Tokenizer
from hamu_jax.run import progress

# Pairs of splits, of which the second is expected to have higher values. On texts that a model was not
# trained on, losses are higher and Min-K% scores are lower.
_LOSS_PAIRS = (("retain", "forget"), ("forget", "test"))
_SCORE_PAIRS = (("forget", "retain"), ("test", "forget"))
_MEANS = ("accuracy", "loss", "entropy", "probability", "token_probability")


class Evaluator:
  """Evaluates a language model on every split, with few compilations.

  Args:
    apply: function of `Llama.apply`, or of `lora.with_lora`, of the variables below.
    config: sizes of the model.
    base: variables that no method trains, on the devices of the evaluation.
    splits: questions by name of the split.
    tokenizer: tokenizer of the model.
    batch_tokens: largest number of tokens of a batch over all devices, padding and new tokens included; each
      device has at least one row.
    new_tokens: largest number of tokens of a generated answer.
    eos_token_ids: tokens that end a generated answer; None takes the tokenizer's.
    dtype: type of the model's computation and of cached keys and values.
    fraction: share of an answer's tokens that Min-K% averages.
    variant: variant of TOFU's scores, see `metrics.tofu`.
    rouge_words: words of ROUGE, see `metrics.tofu.rouge`.
    mesh: devices that share the rows of each batch, or None for the default device.
    progress: (title, number of batches) -> context manager with `update(batch)`, such as
      `progress.Progress`.

  Raises:
    UserError: a split is empty or its answers do not belong together, or a text has no answer,
      nothing before it, or tokens unknown to the model.
  """

  def __init__(
    self,
    apply: Callable[..., Any],
    config: LlamaConfig,
    base: Mapping[str, Any],
    splits: Mapping[str, Questions],
    *,
    tokenizer: Tokenizer,
    batch_tokens: int = 8192,
    new_tokens: int = 200,
    eos_token_ids: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
    fraction: float = 0.1,
    variant: str = "geometric",
    rouge_words: str = "latin",
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[..., Any] = functools.partial(progress.Progress, enabled=False),
  ):
    self.splits = splits
    self._base = dict(base)
    self._tokenizer = tokenizer
    self._fraction = fraction
    self._variant, self._rouge_words = variant, rouge_words
    self._predictor = Predictor(
      apply,
      config,
      [
        text
        for name, questions in splits.items()
        for texts in checked_texts(name, questions, config).values()
        for text in texts
      ],
      batch_tokens=batch_tokens,
      new_tokens=new_tokens,
      ends=tuple(tokenizer.eos_token_ids if eos_token_ids is None else eos_token_ids),
      dtype=dtype,
      mesh=mesh,
      progress=progress,
    )

  def per_example(self, variables) -> dict[str, dict[str, np.ndarray]]:
    """Evaluates every answer.

    Args:
      variables: trained variables, which replace those of `base` with the same name.

    Returns:
      {split: {name: [n]}}, in the order of the split's `indices`:

      - "loss": mean cross-entropy of the answer's tokens, the end included, in nats a token.
      - "probability": `exp(-loss)`, the geometric mean of the probabilities of its tokens, as in TOFU.
      - "token_probability": the mean of the probabilities of its tokens, as in HAMU's code.
      - "accuracy": share of its tokens that are the likeliest, given the true tokens before.
      - "entropy": mean entropy of the predicted distributions, in nats.
      - "tokens": number of tokens of the answer.
      - "min_k", "min_k_plus_plus": higher for members, see `metrics.membership`.
      - "zlib": `membership.zlib_ratio`, lower for members.
    """
    found = self._predictor.predictions(
      {**self._base, **variables},
      {name: texts_of(questions.answers, questions.indices) for name, questions in self.splits.items()},
    )
    return {name: self._examples(questions, found[name]) for name, questions in self.splits.items()}

  def summary(self, variables) -> dict[str, Any]:
    """Means of every split, and the areas under the ROC curves of membership scores.

    Every answer has the same weight, whatever its length. "accuracy" is the mean over answers of their share
    of right tokens, "loss" the mean over answers of their mean loss.

    Args:
      variables: see `per_example`.

    Returns:
      {split: {name of a mean: value, "count": number of answers}}; the means are those of `per_example` from
      "loss" to "entropy".
      If the splits exist, also "retain_forget_auc" and "forget_test_auc" of the losses, the same pairs with
      the suffix "_zlib_auc", and "forget_retain" and "test_forget" with "_min_k_auc" and
      "_min_k_plus_plus_auc". Each AUC is the probability that a random answer of the second split has the
      higher value.
    """
    examples = self.per_example(variables)
    result: dict[str, Any] = {
      name: {key: float(np.mean(values[key])) for key in _MEANS} | {"count": len(values["loss"])}
      for name, values in examples.items()
    }
    for key, pairs, suffix in (
      ("loss", _LOSS_PAIRS, "auc"),
      ("zlib", _LOSS_PAIRS, "zlib_auc"),
      ("min_k", _SCORE_PAIRS, "min_k_auc"),
      ("min_k_plus_plus", _SCORE_PAIRS, "min_k_plus_plus_auc"),
    ):
      for first, second in pairs:
        if first in examples and second in examples:
          result[f"{first}_{second}_{suffix}"] = membership.loss_auc(
            examples[first][key], examples[second][key]
          )
    return result

  def generate(self, variables, split: str) -> list[str]:
    """Generates answers to the prompts of a split by the likeliest token at each place.

    Args:
      variables: see `per_example`.
      split: name of the split.

    Returns:
      n texts, in the order of the split's `indices`, without the token that ends them.

    Raises:
      UserError: a prompt leaves no room for new tokens in the model's context.
    """
    return self._generate(variables, [split])[split]

  def suite(self, variables) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """TOFU's scores of every split, with generated answers.

    Splits with a name in `metrics.tofu.SPLITS` are scored by its rule, all others as retain. A score whose
    inputs are missing is left out, such as the truth ratio of questions without wrong answers, or ROUGE of
    texts without questions.

    Args:
      variables: see `per_example`.

    Returns:
      values: {split: {"rouge", "probability", "truth_ratio"}}, the means of
        `metrics.tofu.split_scores`, and "model_utility" where its nine inputs exist.
      records: {split: {name: n values}}: "row", the index in the split; "question", "answer" and "generated",
        lists of texts; the arrays of `per_example`; the arrays that `metrics.tofu` takes, under its names;
        "rouge_score", "probability_score" and "truth_ratio_score", whose means are in `values`; and
        "truth_ratio", which `metrics.tofu.forget_quality` compares with that of a retrained model.

    Raises:
      UserError: see `generate`, or the package rouge-score is missing.
    """
    found = self._predictor.predictions(
      {**self._base, **variables},
      {
        (name, key): texts
        for name, questions in self.splits.items()
        for key, texts in all_texts(questions).items()
      },
    )
    # Nothing is generated for texts without questions.
    generated = self._generate(
      variables, [name for name, split in self.splits.items() if any(split.texts.prompts)]
    )
    records = {}
    for name, questions in self.splits.items():
      record = suite.texts(questions, generated.get(name), self._rouge_words) | suite.losses(
        {key: values.loss for (split, key), values in found.items() if split == name}
      )
      record |= self._examples(questions, found[name, "answer"])
      if questions.perturbed:
        # Forget quality takes the geometric mean, whatever the variant of model utility.
        record["truth_ratio"] = tofu.truth_ratio(
          record["avg_paraphrased_loss"], record["average_perturb_loss"]
        )
      records[name] = record
    return suite.add_scores(records, self._variant), records

  def _generate(self, variables, names: Sequence[str]) -> dict[str, list[str]]:
    """`generate` of several splits at once."""
    sets = {name: texts_of(self.splits[name].answers, self.splits[name].indices) for name in names}
    found = self._predictor.continuations({**self._base, **variables}, sets)
    return {name: self._tokenizer.decode_batch(tokens) for name, tokens in found.items()}

  def _examples(self, questions: Questions, found: Predictions) -> dict[str, np.ndarray]:
    """`per_example` of one split."""
    tokens: dict[str, Any] = {"mask": found.mask_nxP, "fraction": self._fraction}
    return {
      "loss": found.loss,
      "probability": np.exp(-found.loss),
      "token_probability": found.mean(np.exp(found.log_probs_nxP) * found.mask_nxP),
      "accuracy": found.mean(found.correct_nxP),
      "entropy": -found.mean(found.means_nxP),
      "tokens": found.mask_nxP.sum(axis=1),
      "min_k": membership.min_k(found.log_probs_nxP, **tokens),
      "min_k_plus_plus": membership.min_k_plus_plus(
        found.log_probs_nxP, found.means_nxP, found.deviations_nxP, **tokens
      ),
      "zlib": membership.zlib_ratio(
        found.loss, [questions.texts.answers[index] for index in questions.indices]
      ),
    }
