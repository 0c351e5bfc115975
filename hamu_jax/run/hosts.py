"""Several processes acting as one: start-up, agreement, and who writes.

With one process every function here is a no-op.
"""

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from hamu_jax.errors import UserError


def initialize(config: ml_collections.ConfigDict) -> None:
  """Joins the processes of a run; must come before any other use of JAX.

  Args:
    config: `config.distributed`: `coordinator` (host:port of process 0; "" for a single process; "auto"
      where the cluster tells, as on TPU pods and SLURM), `num_processes`, `process_id`.

  Raises:
    UserError: the processes did not find each other.
  """
  if not config.coordinator:
    return
  try:
    if config.coordinator == "auto":
      jax.distributed.initialize()
    else:
      jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f"config.distributed: could not join process {config.process_id} of {config.num_processes} at "
      f"{config.coordinator!r}: {str(error).splitlines()[0]}; check that process 0 is running there "
      "and reachable"
    ) from error


def is_writer() -> bool:
  """Whether this process writes the run directory."""
  return jax.process_index() == 0


def agree(values) -> np.ndarray:
  """The elementwise maximum of `values` over the processes: the same decision everywhere."""
  values = np.asarray(values)
  if jax.process_count() == 1:
    return values
  return np.max(multihost_utils.process_allgather(values), axis=0)


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
