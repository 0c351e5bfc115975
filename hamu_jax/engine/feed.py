"""The protocol of a feed, which delivers the batches of a stage to its devices."""

from typing import Any, Protocol

import jax

from hamu_jax.engine.step import Batches


class Feed(Protocol):
  """Delivers the training examples of an experiment, one chunk of steps after the other.

  A step gathers its batch from the data of a chunk by the indices of the chunk's batches, so it does not
  depend on where the examples are. Call `prepare` with a plan before the other methods.

  Attributes:
    sharded: whether each device of a mesh has its own data, whose leaves have leading axes [roles, devices a
      role]; else all devices have the same.
  """

  sharded: bool

  def prepare(self, plan: Any, total_steps: int) -> None:
    """Prepares for the first `total_steps` steps of a plan, such as a `data.BatchPlan`.

    Raises:
      UserError: an example does not fit into a batch.
    """

  def most_steps(self, plan: Any) -> int:
    """The largest number of steps that a chunk of this plan may have, 1 to `chunk.CHUNK_CAPACITY`."""
    ...

  def chunk(self, plan: Any, start: int, stop: int, mesh: jax.sharding.Mesh | None) -> tuple[Any, Batches]:
    """The data and the batches of the steps start..stop-1 of a plan, on the devices of the mesh.

    The task's `fetch` gathers from the data. The batches are padded to `chunk.CHUNK_CAPACITY` steps, see
    `placement.place_batches`. All chunks of a plan have the same shapes.
    """
    ...
