"""What delivers the batches of a stage to its devices: the protocol that every modality's feed implements."""

from typing import Any, Protocol

import jax

from hamu_jax.engine.step import Batches


class Feed(Protocol):
  """The training examples of an experiment, chunk by chunk of steps.

  A step gathers its batch from a chunk's data by the indices of the chunk's batches, so it knows nothing of
  where the examples are. `prepare` comes before all else that is asked of a plan.

  Attributes:
    sharded: whether each device of a mesh has data of its own, of which the leaves have leading axes
      [roles, devices a role]; else all devices have the same.
  """

  sharded: bool

  def prepare(self, plan: Any, total_steps: int) -> None:
    """Gets ready for the first `total_steps` steps of a plan, a `data.BatchPlan` or one of its kind.

    Raises:
      UserError: an example does not fit.
    """

  def most_steps(self, plan: Any) -> int:
    """Most steps that a chunk of this plan may have, between 1 and `chunk.CHUNK_CAPACITY`."""
    ...

  def chunk(self, plan: Any, start: int, stop: int, mesh: jax.sharding.Mesh | None) -> tuple[Any, Batches]:
    """The data and the batches of the steps start..stop-1 of a plan, on the devices of the mesh.

    The data is what the task's `fetch` gathers from. The batches are padded to `chunk.CHUNK_CAPACITY` steps,
    see `placement.place_batches`; shapes are the same for all chunks of a plan.
    """
    ...
