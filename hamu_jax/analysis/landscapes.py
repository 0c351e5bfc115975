"""Loss landscapes: the retain and the forget loss on a plane around each model.

Axis legend: P points of a landscape along a direction.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hamu_jax.analysis.examples import Examples, Run, microbatches
from hamu_jax.metrics import classification
from hamu_jax.paired import Paired
from hamu_jax.run import progress
from hamu_jax.vision import task as vision
from sam_jax import landscape

Tree = Any


def compute_landscapes(
  run: Run,
  variables: Mapping[str, Tree],
  *,
  points: int,
  max_examples: int,
  normalization: str,
  seed: int,
) -> tuple[np.ndarray, dict[str, Paired]]:
  """Mean losses of retain and forget examples on a plane around each model.

  All models share the random draws of the two directions, which are scaled to each model's weights.

  Args:
    run: The run.
    variables: Variables by name of the model.
    points: P, number of points along each direction from -1 to 1; odd.
    max_examples: Number of examples of each set over which the loss is averaged; the first ones are used.
    normalization: Normalization of the directions, see `sam_jax.landscape.scale_draws`.
    seed: Seed of the draws.

  Returns:
    The coordinates [P], and {name of the model: Paired [P, P] losses in nats}.
  """
  row = _make_row(run)
  coordinates = np.linspace(-1, 1, points, dtype=np.float32)
  # Both sets are padded to one shape, so that one program serves both.
  size = min(max_examples, max(len(examples.labels) for examples in run.examples))
  batches = Paired(
    *(
      jax.device_put(microbatches(Examples(*(array[:size] for array in examples)), size))
      for examples in run.examples
    )
  )
  planes = {
    name: landscape.directions(model["params"], jax.random.key(seed), normalization=normalization)
    for name, model in variables.items()
  }
  grids = {name: Paired(np.zeros((points, points)), np.zeros((points, points))) for name in variables}
  jobs = list(itertools.product(variables, Paired._fields, range(points)))
  with progress.Progress("landscape", len(jobs)) as bar:
    for step, (name, role, index) in enumerate(jobs, start=1):
      getattr(grids[name], role)[index] = row(
        variables[name], planes[name], getattr(batches, role), coordinates, coordinates[index]
      )
      bar.update(step)
  return coordinates, grids


def _make_row(run: Run) -> Callable[..., jax.Array]:
  """(variables, plane, microbatches, alphas [P], beta) -> mean losses [P], one program for all models."""
  config = run.config.data
  forward = vision.make_forward(run.model, config.mean, config.std, None)

  @jax.jit
  def row(variables, plane, batches, alphas, beta):
    def mean_loss(params):
      def summed(batch):
        images, labels, mask = batch
        outputs, _ = forward(variables | {"params": params}, {"image": images}, None, False)
        losses = classification.per_example(outputs.logits, labels)["loss"]
        return jnp.sum(jnp.where(mask, losses, 0))

      return jnp.sum(lax.map(summed, batches)) / jnp.sum(batches[2])

    return landscape.loss_grid(mean_loss, variables["params"], plane, alphas, beta[None])[0]

  return row
