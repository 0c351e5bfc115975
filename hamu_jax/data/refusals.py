"""Answers without content, which methods such as DPO prefer to the answers of the forget set."""

from collections.abc import Sequence

import numpy as np

from hamu_jax.errors import UserError

# The same kind of answers as in TOFU's list (arXiv 2401.06121).
REFUSALS = (
  "I don't know.",
  "I'm not sure.",
  "I have no information about that.",
  "I'm afraid I can't answer that.",
  "That is not something I know.",
  "I don't have an answer to that question.",
  "I'm unable to say.",
  "I haven't learnt anything about that.",
  "That's beyond what I know.",
  "I couldn't tell you.",
  "Unfortunately, I don't have that information.",
  "I wasn't given any knowledge of that.",
  "That topic is unknown to me.",
  "I'm not familiar with that.",
  "I can't recall anything of the kind.",
  "I must admit that I don't know.",
  "I lack the details to answer this.",
  "I have nothing to say about that.",
  "It's a question I can't answer.",
  "My knowledge doesn't cover that.",
)


def draw(refusals: Sequence[str], count: int, seed: int) -> list[str]:
  """Draws one of the refusals for each example.

  Args:
    refusals: texts to draw from.
    count: number of examples.
    seed: seed of the draws.

  Returns:
    `count` refusals.

  Raises:
    UserError: a refusal is empty.
  """
  for number, refusal in enumerate(refusals):
    if not refusal.strip():
      raise UserError(
        f"config.text.refusals: number {number} is {refusal!r}, which is empty; drop it, or give () for the "
        "built-in ones"
      )
  rng = np.random.default_rng(seed)
  return [refusals[index] for index in rng.integers(len(refusals), size=count)]
