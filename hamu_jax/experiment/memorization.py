"""Memorization scores of the training examples, estimated by an ensemble trained on random subsets.

    mem_i = P(model is right on i | i is in its subset) - P(model is right on i | i is not in its subset)

Source: Feldman and Zhang, What Neural Networks Memorize and Why (arXiv 2008.03703).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from hamu_jax import data as data_lib
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.engine import loop as loop_lib
from hamu_jax.engine import methods, sub_step
from hamu_jax.engine import stage as stage_lib
from hamu_jax.errors import UserError
from hamu_jax.run import rundir as rundir_lib
from hamu_jax.run import stage_cache as stages
from hamu_jax.transforms.stop import Stop
from sam_jax import memorization

# Fields of the options that do not change the result of a single model.
_SHARING = ("models", "parallel", "evaluate_epochs")
_STAGE = "memorization"


class Estimate(NamedTuple):
  """Memorization scores and the answers that they are computed from.

  Attributes:
    scores: [N] float64 memorization scores.
    correct: [K, N] bool, whether model k is right on example i.
    included: [K, N] bool, whether model k was trained on example i.
    seconds: training time, summed over interrupted and resumed runs.
  """

  scores: np.ndarray
  correct: np.ndarray
  included: np.ndarray
  seconds: float


def subsets(options: ml_collections.ConfigDict, num_examples: int, seed: int) -> np.ndarray:
  """Draws the training examples of each model, and checks that scores can be estimated from them.

  Args:
    options: `config.memorization`.
    num_examples: number of examples N.
    seed: seed of the draws.

  Returns:
    [K, N] bool.

  Raises:
    UserError: a subset is empty, whole or smaller than a batch, or the models are too few for some example to
      be both in and out of subsets.
  """
  try:
    included = memorization.subsample(num_examples, options.models, options.fraction, seed)
  except ValueError as error:
    raise UserError(f"config.memorization.fraction={options.fraction}: {error}") from error
  try:
    memorization.memorization_scores(np.zeros_like(included), included)
  except ValueError as error:
    raise UserError(f"config.memorization.models={options.models}: {error}") from error
  size = int(included[0].sum())
  if options.batch_size > size:
    raise UserError(
      f"config.memorization.batch_size={options.batch_size}: a model sees {size} of {num_examples} "
      f"examples, so choose 1..{size}"
    )
  return included


def estimate(
  options: ml_collections.ConfigDict,
  available: np.ndarray,
  inputs: Mapping[str, Any],
  *,
  seed: int,
  init,
  loop: loop_lib.Loop,
  evaluator,
  cache: stages.StageCache,
  rundir: rundir_lib.RunDir,
) -> Estimate:
  """Estimates memorization scores of training examples by groups of models that are trained together.

  Every finished model is a stage in the cache. An interrupted estimate goes on with the unfinished models,
  also in groups of another size.

  Args:
    options: `config.memorization`.
    available: [N] int32 indices of the examples.
    inputs: JSON values that the models depend on besides the options.
    seed: seed of the subsets; model k is initialized and shuffled by `seed + k`.
    init: (seed) -> variables of an untrained model.
    loop: loop that trains the groups.
    evaluator: evaluator of the examples, in order.
    cache: cache of finished models.
    rundir: run directory for the means of a group's metrics and for the checkpoints of the group in progress.

  Raises:
    UserError: training fails, or scores cannot be estimated with these options, see `subsets`.
  """
  included = subsets(options, len(available), seed)
  names = keys(options, available, inputs, seed)
  lacking = unfinished(names, cache)
  init = jax.jit(init)
  for first in range(0, len(lacking), options.parallel):
    group = lacking[first : first + options.parallel]
    members = [
      stage_lib.Member(
        _stage(group, options, available[included[k]], seed + k),
        loop.watch.run(functools.partial(init, seed + k)),
        sub_step.Frozen(),
        rundir,
      )
      for k in group
    ]
    name = stages.fingerprint({"models": [names[k] for k in group]})
    outcomes = loop.run(members, rundir.path / "checkpoints" / f"{_STAGE}-{name}")
    _check(outcomes)
    for k, outcome, correct in zip(group, outcomes, _correct(loop, evaluator, outcomes), strict=True):
      record = {
        "steps": outcome.steps,
        "seconds": outcome.seconds,
        "correct": np.packbits(correct).tobytes().hex(),
      }
      cache.publish(_STAGE, names[k], record)
  records: list[Any] = [cache.outcome(_STAGE, key) for key in names]
  correct = np.stack([_unpacked(record["correct"], len(available)) for record in records])
  scores = memorization.memorization_scores(correct, included)
  return Estimate(scores, correct, included, sum(record["seconds"] for record in records))


def keys(
  options: ml_collections.ConfigDict, available: np.ndarray, inputs: Mapping[str, Any], seed: int
) -> list[str]:
  """The keys of the models in the cache; see `estimate` for the arguments."""
  every = {
    **inputs,
    "seed": seed,
    "available": available.tolist(),
    "options": {name: value for name, value in options.to_dict().items() if name not in _SHARING},
  }
  return [stages.fingerprint(every | {"member": k}) for k in range(options.models)]


def unfinished(names: Sequence[str], cache: stages.StageCache) -> list[int]:
  """The numbers of the models whose keys the cache lacks."""
  return [k for k, key in enumerate(names) if cache.outcome(_STAGE, key) is None]


def _correct(loop: loop_lib.Loop, evaluator, outcomes: Sequence[stage_lib.Outcome]) -> np.ndarray:
  """[models, N] bool, whether each model of a group is right on each example."""
  # Via the host: models from a checkpoint are committed to one device, but the evaluator may use several.
  models = jax.device_get([outcome.variables for outcome in outcomes])
  variables = jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *models))
  (values,) = loop.watch.run(lambda: evaluator.per_example(variables, members=True)).values()
  return values["correct"].astype(bool)


def _unpacked(text: str, count: int) -> np.ndarray:
  """[count] bool, from the hexadecimal digits of the cache."""
  return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)


def _stage(
  group: Sequence[int], options: ml_collections.ConfigDict, indices: np.ndarray, seed: int
) -> stage_lib.Stage:
  """The stage that trains one model on its own subset, under the name of its group."""
  plan = data_lib.training_plan(indices, batch_size=options.batch_size, seed=seed)
  return stage_lib.Stage(
    name=f"{_STAGE}{group[0]}",
    title=f"memorization, {len(group)} models up to number {group[-1] + 1} of {options.models}",
    method=methods.TRAINING,
    options=options,
    plan=plan,
    hyperparameters=hyperparameters_of(options),
    total_steps=plan.num_steps(options.epochs),
    seed=seed,
    train=True,
    training_mode=True,
  )


def _check(outcomes: Sequence[stage_lib.Outcome]) -> None:
  """Raises a UserError if the training of a model was stopped."""
  for outcome in outcomes:
    if outcome.stop != Stop.NONE:
      raise UserError(
        f"memorization: a loss, gradient or update was not finite after {outcome.steps} steps; lower "
        "config.memorization.optimizer.learning_rate or set config.memorization.clip_norm"
      )
