"""Per-example evaluation of a language model on named splits of questions and answers.

Shapes: B rows of a batch, T tokens of a row, K blocks of Q predicted tokens of a row, P predicted
tokens of an answer, V vocabulary, D hidden size, N new tokens; n evaluated questions, W wrong
answers to each.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hamu_jax.data.encoding import Encoded
from hamu_jax.data.text import TextSplit
from hamu_jax.errors import UserError
from hamu_jax.metrics import membership, tofu
from hamu_jax.models import generation
from hamu_jax.models.llama_config import LlamaConfig
from hamu_jax.models.tokenizer import Tokenizer
from hamu_jax.run import progress

# Shortest width of a batch, in tokens.
_LEAST_WIDTH = 16
# Predictions of a device whose distributions over the vocabulary are in memory at a time: 0.5 GB in
# float32 at the 128,256 tokens of Llama 3.
_PREDICTIONS = 1024
# Which of two sets is expected to have the lower and which the higher value: losses are higher, and
# Min-K% scores lower, on what the model was not trained on.
_LOSS_PAIRS = (("retain", "forget"), ("forget", "test"))
_SCORE_PAIRS = (("forget", "retain"), ("test", "forget"))
_MEANS = ("accuracy", "loss", "entropy", "probability")
# Model utility is the harmonic mean of three scores of each.
_UTILITY_SPLITS = ("retain", "real_authors", "world_facts")


class Questions(NamedTuple):
  """Some questions of a split.

  Attributes:
    texts: the split, N questions.
    answers: each prompt with its answer.
    rows: [n] which of them are evaluated.
    paraphrased: each prompt with another wording of its answer, or None; the answer itself stands
      in for it, as in TOFU's real authors and world facts.
    perturbed: W times each prompt with a wrong answer; () if there are none.
  """

  texts: TextSplit
  answers: Encoded
  rows: np.ndarray
  paraphrased: Encoded | None = None
  perturbed: tuple[Encoded, ...] = ()


class _Sequence(NamedTuple):
  """A text of which the tokens from `start` on are predicted."""

  ids: np.ndarray
  start: int


class _Shape(NamedTuple):
  """Of a device program: rows, tokens of each, and blocks of predictions of each."""

  rows: int
  width: int
  blocks: int
  block: int


class _Predictions(NamedTuple):
  """What the model makes of the predicted tokens of n texts.

  Attributes:
    log_probs_nxP: of the tokens, in nats.
    correct_nxP: whether they are the likeliest.
    means_nxP: expected log-probabilities, minus the entropies.
    deviations_nxP: standard deviations of the log-probabilities.
    mask_nxP: whether there is a token; the other arrays are 0 where there is none.
  """

  log_probs_nxP: np.ndarray
  correct_nxP: np.ndarray
  means_nxP: np.ndarray
  deviations_nxP: np.ndarray
  mask_nxP: np.ndarray

  def mean(self, values_nxP: np.ndarray) -> np.ndarray:
    """[n] means over the tokens of each text."""
    return np.sum(values_nxP, axis=1, dtype=np.float64) / self.mask_nxP.sum(axis=1)

  @property
  def loss(self) -> np.ndarray:
    """[n] mean cross-entropies, in nats a token."""
    return -self.mean(self.log_probs_nxP)


class Evaluator:
  """Evaluates a language model on every split, with few compilations for all of them.

  Texts are sorted by length and padded to widths of 16, 24, 32, 48, 64, 96, ... tokens; each width
  has one shape of batches. Only what predicts answers goes through the output matrix.

  Args:
    apply: `Llama.apply`, or `lora.with_lora` of it, of the variables below.
    config: of the model.
    base: variables that no method trains, where they are computed with.
    splits: the questions by name.
    tokenizer: of the model.
    batch_tokens: most tokens, padding and new tokens included, of a batch over all devices; a
      device has at least one row.
    new_tokens: most tokens of a generated answer.
    eos_token_ids: tokens that end a generated answer; None takes the tokenizer's.
    dtype: of the model's computation, in which generation caches keys and values.
    fraction: of an answer's tokens that Min-K% averages.
    variant: of TOFU's scores, see `metrics.tofu`.
    mesh: devices that share the rows of each batch, or None for the default device.
    progress: (what is done, batches) -> context manager with `update(batch)`, such as
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
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[..., Any] = functools.partial(progress.Progress, enabled=False),
  ):
    self.splits = splits
    self._progress = progress
    self._base = dict(base)
    self._tokenizer = tokenizer
    self._batch_tokens = batch_tokens
    self._new_tokens = new_tokens
    self._ends = tuple(tokenizer.eos_token_ids if eos_token_ids is None else eos_token_ids)
    self._fraction = fraction
    self._most = config.max_position_embeddings
    self._variant = variant
    self._devices = mesh.devices.size if mesh else 1
    self._sharding = out_shardings = None
    if mesh:
      self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
      out_shardings = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    self._shapes = self._plan(
      [
        sequence
        for name, questions in splits.items()
        for sequences in _checked(name, questions, config).values()
        for sequence in sequences
      ]
    )
    self._predict = jax.jit(_make_predict(apply), out_shardings=out_shardings)
    greedy = generation.make_greedy(
      apply, config, new_tokens=new_tokens, dtype=dtype, eos_token_ids=self._ends
    )
    # Of one compilation with the prompts' sharding, and whole on every host.
    self._greedy = jax.jit(lambda *arguments: greedy(*arguments), out_shardings=out_shardings)

  def per_example(self, variables) -> dict[str, dict[str, np.ndarray]]:
    """What the model makes of every answer.

    Args:
      variables: those that are trained; they replace those of `base` that have the same name.

    Returns:
      {split: {name: [n]}}, in the order of the split's rows:

      - "loss": mean cross-entropy of the answer's tokens, the end included, in nats a token.
      - "probability": `exp(-loss)`.
      - "accuracy": share of its tokens that are the likeliest given the true ones before.
      - "entropy": mean entropy of the predicted distributions, in nats.
      - "tokens": number of them.
      - "min_k", "min_k_plus_plus": higher for members, see `metrics.membership`.
      - "zlib": `membership.zlib_ratio`, lower for members.
    """
    found = self._predictions(
      variables,
      {name: _sequences(questions.answers, questions.rows) for name, questions in self.splits.items()},
    )
    return {name: self._examples(questions, found[name]) for name, questions in self.splits.items()}

  def summary(self, variables) -> dict[str, Any]:
    """Means of every split, and the areas under the ROC curves of membership scores.

    Every answer weighs the same, however long it is: "accuracy" is the mean over answers of the
    share of their tokens that is right, "loss" that of their mean losses.

    Args:
      variables: as in `per_example`.

    Returns:
      {split: {"accuracy", "loss", "entropy", "probability", "count"}}, with the number of answers
      as count. Where the splits exist, "retain_forget_auc" and "forget_test_auc" of the losses, the
      same pairs with "_zlib_auc", and "forget_retain" and "test_forget" with "_min_k_auc" and
      "_min_k_plus_plus_auc". Each AUC is the probability that a random answer of the second set has
      the higher value.
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
    """The likeliest answers, token by token, to the prompts of a split.

    Args:
      variables: as in `per_example`.
      split: name of the split.

    Returns:
      n texts, in the order of the split's rows, of the tokens before the end.

    Raises:
      UserError: a prompt leaves no room for new tokens in the model's context.
    """
    return self._generate(variables, [split])[split]

  def suite(self, variables) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """TOFU's scores of every split, with generated answers.

    Splits by the names of `metrics.tofu.SPLITS` are scored as there, all others as retain. A score
    whose inputs are missing is left out, such as the truth ratio of questions without wrong
    answers, or ROUGE of texts without questions.

    Args:
      variables: as in `per_example`.

    Returns:
      values: {split: {"rouge", "probability", "truth_ratio"}}, the means of
        `metrics.tofu.split_scores`, and "model_utility" where its nine inputs exist.
      records: {split: {name: n values}}: "row"; "question", "answer" and "generated", lists of
        texts; the arrays of `per_example`; those that `metrics.tofu` takes, under its names;
        "rouge_score", "probability_score" and "truth_ratio_score", of which `values` has the means; and
        "truth_ratio", which `metrics.tofu.forget_quality` compares with a retrained model's.

    Raises:
      UserError: as `generate`, or the package rouge-score is missing.
    """
    found = self._predictions(
      variables,
      {
        (name, key): sequences
        for name, questions in self.splits.items()
        for key, sequences in _all_sequences(questions).items()
      },
    )
    # Texts without questions are only read.
    generated = self._generate(
      variables, [name for name, split in self.splits.items() if any(split.texts.prompts)]
    )
    records, scores = {}, {}
    for name, questions in self.splits.items():
      record = _texts(questions, generated.get(name)) | _tofu_losses(
        {key: values.loss for (split, key), values in found.items() if split == name}
      )
      record |= self._examples(questions, found[name, "answer"])
      if questions.perturbed:
        # Forget quality takes the geometric mean, also beside an arithmetic model utility.
        record["truth_ratio"] = tofu.truth_ratio(
          record["avg_paraphrased_loss"], record["average_perturb_loss"]
        )
      kind = name if name in tofu.SPLITS else "retain"
      scores[name] = tofu.split_scores(kind, record, variant=self._variant)
      records[name] = record
    values: dict[str, Any] = {
      name: {key: float(np.mean(score)) for key, score in split.items()} for name, split in scores.items()
    }
    if all(len(scores.get(name, ())) == 3 for name in _UTILITY_SPLITS):
      values["model_utility"] = tofu.model_utility(records, variant=self._variant)
    for name, record in records.items():
      record.update({f"{key}_score": score for key, score in scores[name].items()})
    return values, records

  def _examples(self, questions: Questions, found: _Predictions) -> dict[str, np.ndarray]:
    """`per_example` of one split."""
    tokens = {"mask": found.mask_nxP, "fraction": self._fraction}
    return {
      "loss": found.loss,
      "probability": np.exp(-found.loss),
      "accuracy": found.mean(found.correct_nxP),
      "entropy": -found.mean(found.means_nxP),
      "tokens": found.mask_nxP.sum(axis=1),
      "min_k": membership.min_k(found.log_probs_nxP, **tokens),
      "min_k_plus_plus": membership.min_k_plus_plus(
        found.log_probs_nxP, found.means_nxP, found.deviations_nxP, **tokens
      ),
      "zlib": membership.zlib_ratio(found.loss, [questions.texts.answers[row] for row in questions.rows]),
    }

  def _predictions(self, variables, sets: Mapping[Any, Sequence[_Sequence]]) -> dict:
    """`_Predictions` of each set of texts, whatever the batches."""
    sequences = [sequence for one_set in sets.values() for sequence in one_set]
    variables = {**self._base, **variables}
    groups = _by_width([len(sequence.ids) for sequence in sequences], self._most)
    work = [
      (self._shapes[width], part)
      for width, members in groups.items()
      for part in _batches(members, self._shapes[width].rows)
    ]

    def predict(shape, part):
      batch = [sequences[index] for index in part]
      token_BxT, _ = _pad([sequence.ids for sequence in batch], shape.rows, shape.width)
      position_BxKxQ, label_BxKxQ = _targets(batch, shape)
      placed = (self._place(leaf) for leaf in (token_BxT, position_BxKxQ, label_BxKxQ))
      return part, self._predict(variables, *placed)

    pieces = self._over("evaluate", predict, work)
    counts = np.array([len(sequence.ids) - sequence.start for sequence in sequences])
    mask = np.arange(counts.max())[None] < counts[:, None]
    arrays = [np.zeros(mask.shape, np.float32) for _ in range(4)]
    for part, outputs in pieces:
      for array, values in zip(arrays, outputs, strict=True):
        values = values.reshape(len(values), -1)[: len(part), : mask.shape[1]]
        array[part, : values.shape[1]] = np.where(mask[part, : values.shape[1]], values, 0)
    parts = (_cut(leaf, sets) for leaf in _Predictions(*arrays, mask))
    return {name: _Predictions(*leaves) for name, leaves in zip(sets, zip(*parts, strict=True), strict=True)}

  def _generate(self, variables, names: Sequence[str]) -> dict[str, list[str]]:
    """`generate` of several splits at once, so that few batches are short."""
    sets = {name: _sequences(self.splits[name].answers, self.splits[name].rows) for name in names}
    prompts = [ids[:start] for one_set in sets.values() for ids, start in one_set]
    variables = {**self._base, **variables}
    work = []
    groups = _by_width([len(prompt) for prompt in prompts], self._most - self._new_tokens)
    for width, members in groups.items():
      rows = self._rows(width + self._new_tokens, len(members))
      work += [(width, rows, part) for part in _batches(members, rows)]

    def generate(width, rows, part):
      token_BxT, length_B = _pad([prompts[index] for index in part], rows, width)
      valid_BxT = np.arange(width)[None] < length_B[:, None]
      return part, self._greedy(variables, self._place(token_BxT), self._place(valid_BxT))

    texts = np.empty(len(prompts), object)
    for part, generated in self._over("generate", generate, work):
      texts[part] = self._tokenizer.decode_batch(
        [
          _before_end(token_N[:length].tolist(), self._ends)
          for token_N, length in zip(generated.token_BxN, generated.length_B, strict=True)
        ]
      )[: len(part)]
    return {name: part.tolist() for name, part in zip(sets, _cut(texts, sets), strict=True)}

  def _over(self, name: str, function, work: Sequence[tuple]) -> list:
    """The values of `function` on the host for each tuple of its arguments."""
    results = []
    with self._progress(name, len(work)) as bar:
      for arguments in work:
        results.append(jax.device_get(function(*arguments)))
        bar.update(len(results))
    return results

  def _plan(self, sequences: Sequence[_Sequence]) -> dict[int, _Shape]:
    """The shape of the batches of each width."""
    shapes = {}
    groups = _by_width([len(sequence.ids) for sequence in sequences], self._most)
    for width, members in groups.items():
      rows = self._rows(width, len(members))
      most = max(len(sequences[index].ids) - sequences[index].start for index in members)
      blocks = -(-most * rows // (_PREDICTIONS * self._devices))
      shapes[width] = _Shape(rows, width, blocks, -(-most // blocks))
    return shapes

  def _rows(self, tokens: int, texts: int) -> int:
    """Rows of a batch, each of so many tokens, for so many texts; a multiple of the devices."""
    most = max(1, self._batch_tokens // (tokens * self._devices))
    return min(most, -(-texts // self._devices)) * self._devices

  def _place(self, array: np.ndarray):
    """The rows of an array, each on its device."""
    if self._sharding is None:
      return array
    return jax.make_array_from_callback(array.shape, self._sharding, lambda index: array[index])


def _make_predict(apply):
  """(variables, token_BxT, position_BxKxQ, label_BxKxQ) -> four [B, K, Q], see `_Predictions`."""

  def predict_block(variables, x_BxQxD, label_BxQ):
    logits_BxQxV = apply(variables, x_BxQxD, method="unembed")
    log_probs_BxQxV = jax.nn.log_softmax(logits_BxQxV)
    probs_BxQxV = jnp.exp(log_probs_BxQxV)
    # A token of probability 0 contributes nothing, also where its logarithm is infinite.
    finite_BxQxV = jnp.where(probs_BxQxV > 0, log_probs_BxQxV, 0)
    mean_BxQ = jnp.sum(probs_BxQxV * finite_BxQxV, axis=-1)
    variance_BxQ = jnp.sum(probs_BxQxV * (finite_BxQxV - mean_BxQ[:, :, None]) ** 2, axis=-1)
    log_prob_BxQ = jnp.take_along_axis(log_probs_BxQxV, label_BxQ[:, :, None], axis=-1)[:, :, 0]
    correct_BxQ = (jnp.argmax(logits_BxQxV, axis=-1) == label_BxQ).astype(jnp.float32)
    return log_prob_BxQ, correct_BxQ, mean_BxQ, jnp.sqrt(variance_BxQ)

  def predict(variables, token_BxT, position_BxKxQ, label_BxKxQ):
    x_BxTxD = apply(variables, token_BxT, method="features")
    x_BxKxQxD = jax.vmap(lambda x_TxD, position_KxQ: x_TxD[position_KxQ])(x_BxTxD, position_BxKxQ)
    # Block by block: all distributions at once may not fit.
    values = jax.lax.map(
      lambda block: predict_block(variables, *block),
      (jnp.moveaxis(x_BxKxQxD, 1, 0), jnp.moveaxis(label_BxKxQ, 1, 0)),
    )
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), values)

  return predict


def _sequences(encoded: Encoded, rows: Sequence[int]) -> list[_Sequence]:
  return [_Sequence(encoded.ids[row], int(encoded.answer_start[row])) for row in rows]


def _all_sequences(questions: Questions) -> dict[Any, list[_Sequence]]:
  """The texts with the right answers, with paraphrased ones, and with each of the wrong ones."""
  encoded = {"answer": questions.answers}
  if questions.paraphrased is not None:
    encoded["paraphrased"] = questions.paraphrased
  encoded |= dict(enumerate(questions.perturbed))
  return {key: _sequences(part, questions.rows) for key, part in encoded.items()}


def _tofu_losses(losses: Mapping[Any, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays of `metrics.tofu`, of losses by the keys of `_all_sequences`."""
  wrong = [loss_n for key, loss_n in losses.items() if isinstance(key, int)]
  return {
    "avg_gt_loss": losses["answer"],
    "avg_paraphrased_loss": losses.get("paraphrased", losses["answer"]),
    **({"average_perturb_loss": np.stack(wrong, axis=1)} if wrong else {}),
  }


def _texts(questions: Questions, generated: list[str] | None) -> dict[str, Any]:
  """The questions, their answers, and, if there are any, the model's and how alike these are."""
  texts, rows = questions.texts, questions.rows
  record = {
    "row": np.asarray(rows),
    "question": [texts.prompts[row] for row in rows],
    "answer": [texts.answers[row] for row in rows],
  }
  if generated is not None:
    record |= {"generated": generated, **tofu.rouge(generated, record["answer"])}
  return record


def _before_end(ids: list[int], ends: Sequence[int]) -> list[int]:
  """Generated tokens without the one that ends them, if any does."""
  return ids[:-1] if ids[-1] in ends else ids


def _cut(array: np.ndarray, sets: Mapping[Any, Sequence[Any]]) -> list[np.ndarray]:
  """The parts of an array of all sets' texts that belong to each of them."""
  return np.split(array, np.cumsum([len(one_set) for one_set in sets.values()], dtype=int))[:-1]


def _checked(name: str, questions: Questions, config: LlamaConfig) -> dict[Any, list[_Sequence]]:
  """`_all_sequences`, or the UserError that says what is wrong with them."""
  if not len(questions.rows):
    raise UserError(f"evaluation: split {name} has no questions; choose sets that are not empty")
  count = len(questions.answers.ids)
  for encoded in (questions.paraphrased, *questions.perturbed):
    if encoded is not None and len(encoded.ids) != count:
      raise UserError(
        f"evaluation: split {name} has {count} answers and {len(encoded.ids)} other ones; give "
        "one for each question"
      )
  found = _all_sequences(questions)
  for sequences in found.values():
    for row, (ids, start) in zip(questions.rows, sequences, strict=True):
      where = f"evaluation: split {name}, row {row}"
      if not 1 <= start < len(ids):
        raise UserError(
          f"{where}: its answer begins at token {start} of {len(ids)}; a text needs a token "
          "before its answer and one in it, so raise the most tokens of a text"
        )
      if len(ids) > config.max_position_embeddings:
        raise UserError(
          f"{where}: {len(ids)} tokens exceed the model's context of "
          f"{config.max_position_embeddings}; lower the most tokens of a text"
        )
      if min(ids) < 0 or max(ids) >= config.vocab_size:
        raise UserError(
          f"{where}: token {max(ids)} is none of the model's {config.vocab_size}; give the "
          "model's own tokenizer"
        )
  return found


def _width(length: int) -> int:
  """The next of 16, 24, 32, 48, 64, 96, ...: above 16 less than a third is padding."""
  width = _LEAST_WIDTH
  while width < length:
    if 3 * width // 2 >= length:
      return 3 * width // 2
    width *= 2
  return width


def _by_width(lengths: Sequence[int], most: int) -> dict[int, list[int]]:
  """Which texts go into batches of which width, shortest first; none is padded beyond `most`."""
  groups: dict[int, list[int]] = {}
  for index in sorted(range(len(lengths)), key=lengths.__getitem__):
    length = lengths[index]
    groups.setdefault(max(length, min(_width(length), most)), []).append(index)
  return groups


def _batches(members: list[int], size: int) -> list[list[int]]:
  return [members[start : start + size] for start in range(0, len(members), size)]


def _pad(texts: Sequence[np.ndarray], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [rows, width], padded on the right, copies of the first text below; lengths [rows]."""
  token_BxT = np.zeros((rows, width), np.int32)
  texts = [*texts, *[texts[0]] * (rows - len(texts))]
  for token_T, text in zip(token_BxT, texts, strict=True):
    token_T[: len(text)] = text
  return token_BxT, np.array([len(text) for text in texts])


def _targets(batch: Sequence[_Sequence], shape: _Shape) -> tuple[np.ndarray, np.ndarray]:
  """Positions that predict answers and the answers' tokens, [B, K, Q]; 0 where there is none."""
  position_BxP, label_BxP = np.zeros((2, shape.rows, shape.blocks * shape.block), np.int32)
  for row, (ids, start) in enumerate(batch):
    count = len(ids) - start
    position_BxP[row, :count] = np.arange(start - 1, len(ids) - 1)
    label_BxP[row, :count] = ids[start:]
  blocks = (shape.rows, shape.blocks, shape.block)
  return position_BxP.reshape(blocks), label_BxP.reshape(blocks)
