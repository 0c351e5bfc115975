"""Loss landscapes: the retain, forget and test loss on a plane around each model.

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
from hamu_jax.run import compilation, progress
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
) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
  """Mean losses of retain, forget and test examples on a plane around each model.

  All models share the random draws of the two directions, which are scaled to each model's weights.

  Args:
    run: The run.
    variables: Variables by name of the model.
    points: P, number of points along each direction from -1 to 1; odd.
    max_examples: Number of examples of each set over which the loss is averaged; the first ones are used.
    normalization: Normalization of the directions, see `sam_jax.landscape.scale_draws`.
    seed: Seed of the draws.

  Returns:
    The coordinates [P], and {name of the model: {set: [P, P] losses in nats}}.
  """
  row = _make_row(run)
  coordinates = np.linspace(-1, 1, points, dtype=np.float32)
  sets = {**run.examples._asdict(), "test": run.test}
  # All sets are padded to one shape, so that one program serves them.
  size = min(max_examples, max(len(examples.labels) for examples in sets.values()))
  batches = {
    role: jax.device_put(microbatches(Examples(*(array[:size] for array in examples)), size))
    for role, examples in sets.items()
  }
  planes = {
    name: landscape.directions(model["params"], jax.random.key(seed), normalization=normalization)
    for name, model in variables.items()
  }
  grids = {name: {role: np.zeros((points, points)) for role in sets} for name in variables}
  jobs = list(itertools.product(variables, sets, range(points)))
  with progress.Progress("landscape", len(jobs)) as bar:
    for step, (name, role, index) in enumerate(jobs, start=1):
      grids[name][role][index] = row(
        variables[name], planes[name], batches[role], coordinates, coordinates[index]
      )
      bar.update(step)
  return coordinates, grids


def _make_row(run: Run) -> Callable[..., jax.Array]:
  """(variables, plane, microbatches, alphas [P], beta) -> mean losses [P], one program for all models."""
  config = run.config.data
  forward = vision.make_forward(run.model, config.mean, config.std, None)

  @compilation.jit
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
