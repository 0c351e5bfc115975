"""Multi-process runs: start-up, agreement between processes, and the choice of the writer.

With a single process every function here is a no-op.
"""

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from hamu_jax.errors import UserError


def initialize(config: ml_collections.ConfigDict) -> None:
  """Connects the processes of a run. It must be called before any other use of JAX.

  Args:
    config: `config.distributed` with `coordinator` (host:port of process 0; "" for a single process; "auto"
      if the cluster provides it, as TPU pods and SLURM do), `num_processes` and `process_id`.

  Raises:
    UserError: if the processes do not find each other.
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
  """The elementwise maximum of `values` over the processes, so that all make the same decision."""
  values = np.asarray(values)
  if jax.process_count() == 1:
    return values
  return np.max(multihost_utils.process_allgather(values), axis=0)


def barrier(name: str) -> None:
  """Waits until every process has reached this call."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
