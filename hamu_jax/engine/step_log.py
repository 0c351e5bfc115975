"""Logs the steps of a chunk."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hamu_jax.engine.position import Track
from hamu_jax.engine.stage import Member
from hamu_jax.transforms import BRANCHES
from hamu_jax.transforms.stop import Stop


def log(members: Sequence[Member], tracks: Sequence[Track], before: Sequence[int], metrics, done) -> None:
  """Writes one line of metrics for each step of a chunk to each run directory.

  Args:
    members: members of the stage.
    tracks: tracks of the members; `last_metrics` is updated.
    before: number of steps that each member had applied before the chunk.
    metrics: {name: [n]} for one member, {name: [members, n]} for several.
    done: number of steps that each member ran, [] or [members].
  """
  if len(members) == 1:
    metrics, done = jax.tree.map(lambda leaf: np.asarray(leaf)[None], (metrics, done))
  stops = metrics.pop("stop")
  sharing: dict[int, list[int]] = {}
  for k, member in enumerate(members):
    sharing.setdefault(id(member.rundir), []).append(k)
  for group in sharing.values():
    stage, rundir = members[group[0]].stage, members[group[0]].rundir
    for index in range(int(done[group].min())):
      values = {name: _mean(of_members[group, index]) for name, of_members in metrics.items()}
      values["applied"] = bool(np.all(stops[group, index] == Stop.NONE))
      values |= branch_fractions(values)
      values = _without_idle_roles(values)
      rundir.write(stage.name, before[group[0]] + index + 1, "step", values)
      for k in group:
        tracks[k].last_metrics = values


def _mean(values: np.ndarray):
  """The mean over members; the value itself for one member."""
  return values[0] if len(values) == 1 else values.mean(0)


def _without_idle_roles(values: dict[str, Any]) -> dict[str, Any]:
  """Leaves out the values of a role whose sub-step was not active."""
  idle = [role for role in ("retain", "forget") if not values.pop(f"{role}_active", True)]
  prefixes = tuple(f"{role}_" for role in idle)
  return {name: value for name, value in values.items() if not name.startswith(prefixes)}


def branch_fractions(values: dict[str, Any]) -> dict[str, float]:
  """The share of blocks in each branch of HAMU, as `branch_<name>`; {} for other methods."""
  if "branch" not in values:
    return {}
  return {f"branch_{name}": float(np.mean(values["branch"] == code)) for code, name in enumerate(BRANCHES)}
