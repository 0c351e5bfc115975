"""Predicts the answers in texts, and continues prompts, with a language model in batches of few shapes.

Texts are sorted by length and padded to widths of 16, 24, 32, 48, 64, 96, ... tokens; each width has one
shape of batches. The output matrix is applied only at the places that predict answers.

Shapes: B rows of a batch, T tokens of a row, K blocks of Q predicted tokens of a row, P predicted
tokens of an answer, V vocabulary, D hidden size, N new tokens; n texts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hamu_jax.language.questions import Text
from hamu_jax.models import generation
from hamu_jax.models.llama_config import LlamaConfig

# Shortest width of a batch, in tokens.
_LEAST_WIDTH = 16
# Predictions whose distributions over the vocabulary a device holds in memory at a time: 0.5 GB in float32
# for the 128,256 tokens of Llama 3.
_PREDICTIONS = 1024


class _Shape(NamedTuple):
  """The shape of a batch: rows, tokens of a row, and blocks of predictions of a row and their size."""

  rows: int
  width: int
  blocks: int
  block: int


class Predictions(NamedTuple):
  """The predictions of the tokens of n texts.

  Attributes:
    log_probs_nxP: log-probabilities of the tokens, in nats.
    correct_nxP: whether the tokens are the likeliest.
    means_nxP: expected log-probabilities, which are the negative entropies.
    deviations_nxP: standard deviations of the log-probabilities.
    mask_nxP: whether there is a token; the other arrays are 0 where it is False.
  """

  log_probs_nxP: np.ndarray
  correct_nxP: np.ndarray
  means_nxP: np.ndarray
  deviations_nxP: np.ndarray
  mask_nxP: np.ndarray

  def mean(self, values_nxP: np.ndarray) -> np.ndarray:
    """[n] means of values over the tokens of each text."""
    return np.sum(values_nxP, axis=1, dtype=np.float64) / self.mask_nxP.sum(axis=1)

  @property
  def loss(self) -> np.ndarray:
    """[n] mean cross-entropies, in nats a token."""
    return -self.mean(self.log_probs_nxP)


class Predictor:
  """Predicts and continues texts with a language model, with few compilations.

  Args:
    apply: function of `Llama.apply` or of `lora.with_lora`.
    config: sizes of the model.
    texts: all texts for `predictions`, which determine the shapes of batches.
    batch_tokens: largest number of tokens of a batch over all devices, padding and new tokens included; each
      device has at least one row.
    new_tokens: largest number of tokens of a continuation.
    ends: tokens that end a continuation.
    dtype: type of the model's computation and of cached keys and values.
    mesh: devices that share the rows of each batch, or None for the default device.
    progress: (title, number of batches) -> context manager with `update(batch)`.
  """

  def __init__(
    self,
    apply: Callable[..., Any],
    config: LlamaConfig,
    texts: Sequence[Text],
    *,
    batch_tokens: int,
    new_tokens: int,
    ends: tuple[int, ...],
    dtype: Any,
    mesh: jax.sharding.Mesh | None,
    progress: Callable[..., Any],
  ):
    self._progress = progress
    self._batch_tokens = batch_tokens
    self._new_tokens = new_tokens
    self._ends = ends
    self._most = config.max_position_embeddings
    self._devices = mesh.devices.size if mesh else 1
    self._sharding = out_shardings = None
    if mesh:
      self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
      out_shardings = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    self._shapes = self._plan(texts)
    self._predict = jax.jit(_make_predict(apply), out_shardings=out_shardings)
    greedy = generation.make_greedy(apply, config, new_tokens=new_tokens, dtype=dtype, eos_token_ids=ends)
    # A function of its own, with the sharding of the prompts and results whole on every host.
    self._greedy = jax.jit(lambda *arguments: greedy(*arguments), out_shardings=out_shardings)

  def predictions(self, variables, sets: Mapping[Any, Sequence[Text]]) -> dict[Any, Predictions]:
    """Predicts the texts of each set.

    Args:
      variables: variables of `apply`.
      sets: texts by the name of their set.
    """
    texts = [text for one_set in sets.values() for text in one_set]
    groups = _by_width([len(text.ids) for text in texts], self._most)
    work = [
      (self._shapes[width], part)
      for width, members in groups.items()
      for part in _batches(members, self._shapes[width].rows)
    ]

    def predict(shape, part):
      batch = [texts[index] for index in part]
      token_BxT, _ = _pad([text.ids for text in batch], shape.rows, shape.width)
      position_BxKxQ, label_BxKxQ = _targets(batch, shape)
      placed = (self._place(leaf) for leaf in (token_BxT, position_BxKxQ, label_BxKxQ))
      return part, self._predict(variables, *placed)

    pieces = self._over("evaluate", predict, work)
    counts = np.array([len(text.ids) - text.start for text in texts])
    mask = np.arange(counts.max())[None] < counts[:, None]
    arrays = [np.zeros(mask.shape, np.float32) for _ in range(4)]
    for part, outputs in pieces:
      for array, values in zip(arrays, outputs, strict=True):
        values = values.reshape(len(values), -1)[: len(part), : mask.shape[1]]
        array[part, : values.shape[1]] = np.where(mask[part, : values.shape[1]], values, 0)
    parts = (_cut(leaf, sets) for leaf in Predictions._make([*arrays, mask]))
    return {name: Predictions(*leaves) for name, leaves in zip(sets, zip(*parts, strict=True), strict=True)}

  def continuations(self, variables, sets: Mapping[Any, Sequence[Text]]) -> dict[Any, list[list[int]]]:
    """Continues the prompts of each set by the likeliest tokens, without the token that ends them.

    All sets are continued together, so that few batches are short.

    Args:
      variables: variables of `apply`.
      sets: texts by the name of their set; the tokens before `start` are the prompt.

    Raises:
      UserError: a prompt leaves no room for new tokens in the model's context.
    """
    prompts = [ids[:start] for one_set in sets.values() for ids, start in one_set]
    work = []
    groups = _by_width([len(prompt) for prompt in prompts], self._most - self._new_tokens)
    for width, members in groups.items():
      rows = self._rows(width + self._new_tokens, len(members))
      work += [(width, rows, part) for part in _batches(members, rows)]

    def generate(width, rows, part):
      token_BxT, length_B = _pad([prompts[index] for index in part], rows, width)
      valid_BxT = np.arange(width)[None] < length_B[:, None]
      return part, self._greedy(variables, self._place(token_BxT), self._place(valid_BxT))

    found = np.empty(len(prompts), object)
    for part, generated in self._over("generate", generate, work):
      # The rows after those of the part are copies that fill the batch.
      for index, token_N, length in zip(part, generated.token_BxN, generated.length_B):
        found[index] = _before_end(token_N[:length].tolist(), self._ends)
    return {name: part.tolist() for name, part in zip(sets, _cut(found, sets), strict=True)}

  def _over(self, name: str, function, work: Sequence[tuple]) -> list:
    """The values of `function` on the host for each tuple of its arguments."""
    results = []
    with self._progress(name, len(work)) as bar:
      for arguments in work:
        results.append(jax.device_get(function(*arguments)))
        bar.update(len(results))
    return results

  def _plan(self, texts: Sequence[Text]) -> dict[int, _Shape]:
    """The shape of the batches of each width."""
    shapes = {}
    groups = _by_width([len(text.ids) for text in texts], self._most)
    for width, members in groups.items():
      rows = self._rows(width, len(members))
      most = max(len(texts[index].ids) - texts[index].start for index in members)
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
  """Makes (variables, token_BxT, position_BxKxQ, label_BxKxQ) -> four [B, K, Q], see `Predictions`."""

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
    # Block by block, because all distributions at once may not fit into memory.
    values = jax.lax.map(
      lambda block: predict_block(variables, *block),
      (jnp.moveaxis(x_BxKxQxD, 1, 0), jnp.moveaxis(label_BxKxQ, 1, 0)),
    )
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), values)

  return predict


def _before_end(ids: list[int], ends: Sequence[int]) -> list[int]:
  """Generated tokens without the token that ends them, if there is one."""
  return ids[:-1] if ids[-1] in ends else ids


def _cut(array: np.ndarray, sets: Mapping[Any, Sequence[Any]]) -> list[np.ndarray]:
  """The parts of an array over all texts, one for each set."""
  return np.split(array, np.cumsum([len(one_set) for one_set in sets.values()], dtype=int))[:-1]


def _width(length: int) -> int:
  """The next of 16, 24, 32, 48, 64, 96, ...; above 16, less than a third is padding."""
  width = _LEAST_WIDTH
  while width < length:
    if 3 * width // 2 >= length:
      return 3 * width // 2
    width *= 2
  return width


def _by_width(lengths: Sequence[int], most: int) -> dict[int, list[int]]:
  """The indices of the texts of each width, shortest first; no width is above `most`."""
  groups: dict[int, list[int]] = {}
  for index in sorted(range(len(lengths)), key=lengths.__getitem__):
    length = lengths[index]
    groups.setdefault(max(length, min(_width(length), most)), []).append(index)
  return groups


def _batches(members: list[int], size: int) -> list[list[int]]:
  return [members[start : start + size] for start in range(0, len(members), size)]


def _pad(texts: Sequence[np.ndarray], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [rows, width], padded on the right, and lengths [rows]; copies of the first text fill the rows."""
  token_BxT = np.zeros((rows, width), np.int32)
  texts = [*texts, *[texts[0]] * (rows - len(texts))]
  for token_T, text in zip(token_BxT, texts, strict=True):
    token_T[: len(text)] = text
  return token_BxT, np.array([len(text) for text in texts])


def _targets(batch: Sequence[Text], shape: _Shape) -> tuple[np.ndarray, np.ndarray]:
  """Positions that predict answers, and the tokens of the answers, [B, K, Q]; 0 is padding."""
  position_BxP, label_BxP = np.zeros((2, shape.rows, shape.blocks * shape.block), np.int32)
  for row, (ids, start) in enumerate(batch):
    count = len(ids) - start
    position_BxP[row, :count] = np.arange(start - 1, len(ids) - 1)
    label_BxP[row, :count] = ids[start:]
  blocks = (shape.rows, shape.blocks, shape.block)
  return position_BxP.reshape(blocks), label_BxP.reshape(blocks)
