"""Optax transformations that combine a retain and a forget gradient into one update."""

from hamu_jax.transforms.alignment import Alignment
from hamu_jax.transforms.combine import AlignmentState, add, average, plain
from hamu_jax.transforms.conflict import ConflictState, gru, pcgrad
from hamu_jax.transforms.hamu import HamuDiagnostics, HamuState, hamu
from hamu_jax.transforms.hamu_update import BRANCHES, HamuUpdate, hamu_update
from hamu_jax.transforms.stop import Stop

__all__ = [
  "BRANCHES",
  "Alignment",
  "AlignmentState",
  "ConflictState",
  "HamuDiagnostics",
  "HamuState",
  "HamuUpdate",
  "Stop",
  "add",
  "average",
  "gru",
  "hamu",
  "hamu_update",
  "pcgrad",
  "plain",
]
