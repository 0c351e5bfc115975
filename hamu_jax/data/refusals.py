"""Answers that say nothing, for methods that prefer them to what is to be forgotten."""

from collections.abc import Sequence

import numpy as np

from hamu_jax.errors import UserError

# In the spirit of TOFU's list (arXiv 2401.06121).
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
  """One of the refusals for each of `count` examples, drawn by the seed.

  Raises:
    UserError: one of them is empty.
  """
  for number, refusal in enumerate(refusals):
    if not refusal.strip():
      raise UserError(
        f"config.text.refusals: number {number} is {refusal!r}, no answer; drop it, or give () for the "
        "built-in ones"
      )
  rng = np.random.default_rng(seed)
  return [refusals[index] for index in rng.integers(len(refusals), size=count)]
