"""The position of a stage: the states of its models and their tracks, all that a checkpoint holds."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from hamu_jax.engine.train_state import TrainState
from hamu_jax.run.rundir import jsonable
from hamu_jax.transforms.stop import Stop

Tree = Any


@dataclasses.dataclass
class Track:
  """What the host remembers of one model: its best variables, score, evaluation and last metrics."""

  best: Tree
  best_score: float = -1.0
  evaluated: int = -1
  # The evaluation of the best model if the stage selects one, else of the last evaluated model.
  evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)
  last_metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

  def meta(self) -> dict[str, Any]:
    """The JSON part of a checkpoint: all but `best`."""
    return jsonable(
      {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "best"}
    )


@dataclasses.dataclass
class Position:
  """The position of a stage: the state, with a leading axis if there are several models, and the tracks."""

  state: TrainState
  tracks: list[Track]
  seconds: float = 0.0

  def states(self) -> list[TrainState]:
    """The state of each model."""
    return split(self.state, len(self.tracks))

  def progress(self) -> list[tuple[int, bool]]:
    """The steps that each model has applied so far, and whether a stop has ended its stage."""
    steps, stops = np.atleast_1d(self.state.step), np.atleast_1d(self.state.stop)
    return [(int(step), bool(stop != Stop.NONE)) for step, stop in zip(steps, stops, strict=True)]

  def step(self) -> int:
    """The steps applied so far by models whose stage goes on, or by all if none goes on."""
    progress = self.progress()
    return max([step for step, stopped in progress if not stopped] or [step for step, _ in progress])

  def arrays(self) -> Tree:
    """The array part of a checkpoint."""
    return serialization.to_state_dict({"state": self.state, "best": [track.best for track in self.tracks]})

  def meta(self) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return {"tracks": [track.meta() for track in self.tracks], "seconds": self.seconds}

  def restore(self, arrays: Tree, meta: dict[str, Any]) -> None:
    """Restores the position of a checkpoint."""
    like = {"state": self.state, "best": [track.best for track in self.tracks]}
    restored = serialization.from_state_dict(like, arrays)
    self.state, self.seconds = restored["state"], meta["seconds"]
    self.tracks = [
      Track(best, **values) for best, values in zip(restored["best"], meta["tracks"], strict=True)
    ]


def join(trees: Sequence[Tree]) -> Tree:
  """Stacks trees along a new leading axis; returns a single tree unchanged."""
  return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def split(tree: Tree, count: int) -> list[Tree]:
  """Undoes `join` of `count` trees."""
  if count == 1:
    return [tree]
  return [jax.tree.map(lambda leaf: leaf[k], tree) for k in range(count)]
