"""The device program of an experiment on a language model, from sizes and assumed lengths of texts."""

from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from hamu_jax.data import encoding, packing, plans
from hamu_jax.language.adapter import Adapted
from hamu_jax.language.feed import PackedTexts
from hamu_jax.language.request import TextRequest
from hamu_jax.models.llama_config import LlamaConfig
from hamu_jax.paired import Paired
from hamu_jax.planning import abstract_stage

Tree = Any
# Batches of a role in an epoch. The longest batch gets longer with their number.
_BATCHES = 20
# The lengths of texts are evenly spaced between these multiples of the mean; a quarter of each is its prompt.
SHORTEST, LONGEST = 0.5, 1.5
PROMPT = 0.25
# Tokens of an alternative answer.
_REFUSAL = 10


class Texts(Adapted):
  """The task of an experiment on a language model, with texts that have only lengths.

  Args:
    config: validated configuration.
    sizes: sizes of the model.
    example_tokens: mean number of tokens of a text, template included.
  """

  inputs: dict[str, Any] = {}
  unlearning_inputs: dict[str, Any] = {}

  def __init__(self, config: ml_collections.ConfigDict, sizes: LlamaConfig, example_tokens: int):
    super().__init__(config, sizes)
    self._example_tokens = example_tokens
    count = _BATCHES * max(config.train.batch_size, *plans.role_sizes(config.method.batch_size))
    indices = np.arange(2 * count, dtype=np.int32)
    self.request = TextRequest("", Paired(indices[:count], indices[count:]))

  def feed(self) -> PackedTexts:
    """The feed of the packed texts."""
    indices = self.request.indices
    spread = np.linspace(SHORTEST, LONGEST, len(indices.retain)) * self._example_tokens
    tokens = np.tile(spread.round().astype(int).clip(2, self._config.text.max_length), 2)
    prompts = (tokens * PROMPT).astype(int).clip(1)
    alternatives = None
    if self._needs_alternatives:
      alternatives = _encoded(prompts + _REFUSAL, prompts)
    forget = np.arange(len(tokens)) >= len(indices.retain)
    return PackedTexts(
      packing.TextData(_encoded(tokens, prompts), alternatives, forget),
      self._config.text.row_length,
      max(self.microbatch(True), 1),
    )


def _encoded(tokens, prompts) -> encoding.Encoded:
  return encoding.Encoded(tuple(np.ones(count, np.int32) for count in tokens), prompts, 0)


class AbstractStage(abstract_stage.AbstractStage):
  """A stage of an experiment on a language model.

  Attributes:
    shape: shape of its packed batches.

  Args:
    config: validated configuration.
    sizes: sizes of the model.
    devices: devices to choose from; they need not exist.
    example_tokens: see `Texts`.
    stage: one of `abstract_stage.STAGES`.

  Raises:
    UserError: the experiment cannot run on these devices or with such texts.
  """

  examples = "texts"

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    sizes: LlamaConfig,
    devices: Sequence[Any],
    example_tokens: int,
    stage: str = "unlearn",
  ):
    task = Texts(config, sizes, example_tokens)
    super().__init__(config, task, task.request.indices, devices, stage)
    self._example_tokens = example_tokens
    self._feed = task.feed()
    self._feed.prepare(self.stage.plan, self.stage.total_steps)
    self.shape = self._feed.shape(self.stage.plan)

  @property
  def examples_per_batch(self) -> int:
    """The number of packed rows of a role's batch."""
    return self.shape.rows

  def facts(self) -> list[tuple[str, str]]:
    """What is compiled and assumed, as pairs of name and text."""
    mean, shape = self._example_tokens, self.shape
    pieces = f", {self.stage.microbatch} at a time" if self.stage.microbatch else ""
    return [
      *super().facts(),
      (
        "texts",
        f"assumed: {round(SHORTEST * mean)} to {round(LONGEST * mean)} tokens, {mean} on average "
        f"(--example-tokens), {PROMPT:.0%} of them prompt",
      ),
      (
        "packed",
        f"{shape.rows} rows a role of {shape.tokens} tokens and {shape.predictions} predictions, "
        f"at most {self.share} a device{pieces}",
      ),
    ]

  def _base(self) -> Tree:
    base = self._task.abstract_base(self._mesh)
    return {"base": self._placed(base) if self._mesh is None else base}

  def _data(self) -> Tree:
    steps = self._feed.most_steps(self.stage.plan)
    return self._placed(self.shape.empty(steps * self._roles * self.shape.rows))
