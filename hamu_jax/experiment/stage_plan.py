"""The plan of an experiment: its stages, and for each the key of all that its result depends on."""

from typing import Any, NamedTuple

import ml_collections
import numpy as np

import hamu_jax
from hamu_jax import data as data_lib
from hamu_jax.config import default as config_lib
from hamu_jax.config import readers
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.config.readers import MASKED
from hamu_jax.engine import methods
from hamu_jax.engine import stage as stage_lib
from hamu_jax.experiment import given
from hamu_jax.experiment.task import Task
from hamu_jax.models import weights
from hamu_jax.paired import Paired
from hamu_jax.run.stage_cache import fingerprint


class Plan(NamedTuple):
  """The stages for one split into retain and forget examples.

  Attributes:
    stages: stages by name: `pretrain`, `retrain` and, if the method unlearns, `unlearn`.
    keys: keys of these stages and of `mask`; the result of a stage is cached under its name and key.
    final: name of the stage whose model is the experiment's result: the unlearned one, if there is one.
  """

  stages: dict[str, stage_lib.Stage]
  keys: dict[str, str]
  final: str


def model_inputs(config: ml_collections.ConfigDict, task: Task) -> dict[str, Any]:
  """All that every model of an experiment depends on, as JSON values."""
  return {
    "version": hamu_jax.__version__,
    "data": task.request.fingerprint,
    **task.inputs,
    "model": {
      name: value for name, value in config.model.to_dict().items() if name != "weights" and value is not None
    },
    "seed": config.seed,
  }


def given_key(inputs: dict[str, Any], task: Task, path: str, name: str) -> str:
  """The key of a model that is read from elsewhere, see `given.find`."""
  return fingerprint(inputs | {"weights": task.weights_fingerprint(given.find(path, name))})


def make_plan(config: ml_collections.ConfigDict, task: Task, split: Paired, *, devices: int) -> Plan:
  """Plans the stages for one split.

  Args:
    config: validated configuration.
    task: data and model.
    split: Paired int32 indices of the retain and forget examples.
    devices: number of devices that work on a step.

  Raises:
    UserError: a set is empty.
  """
  method = methods.METHODS[config.method.name]
  # If the selection of the trained model does not depend on the split, the order of the training examples
  # must not depend on it either: then one original model serves every forget set.
  by_split = config.train.select == "best" and not len(task.request.validation)
  indices = np.concatenate(split)
  stages = [
    _training(config, task, "pretrain", indices if by_split else np.sort(indices)),
    _training(config, task, "retrain", split.retain),
  ]
  inputs = model_inputs(config, task)
  keys = {
    stage.name: fingerprint(
      inputs
      | {
        "rows": stage.plan.streams.retain.indices.tolist(),
        "train": config.train.to_dict(),
        "sam": _sam_inputs(stage.sam),
        "selected_by": [part.tolist() for part in split] if by_split else task.request.validation.tolist(),
      }
    )
    for stage in stages
  }
  if config.model.weights:
    # The content of the file counts, since it may change under its name.
    keys["pretrain"] = given_key(inputs, task, config.model.weights, "original")
  if reference := readers.given_reference(config):
    keys["retrain"] = given_key(inputs, task, reference, "retrained")
  masks = inputs | {
    "parent": keys["pretrain"],
    "forget": split.forget.tolist(),
    "mask": {name: config.mask[name] for name in ("batch_size", "select")},
  }
  keys["mask"] = fingerprint(masks | {"fractions": config.mask.fractions})
  if not method.unlearns:
    final = "retrain" if method.from_scratch else "pretrain"
    return Plan({stage.name: stage for stage in stages}, keys, final)
  unlearning = _unlearning(config, task, method, split)
  keys["unlearn"] = fingerprint(
    inputs
    | {
      "parent": keys["pretrain"],
      "split": [part.tolist() for part in split],
      **_unlearning_inputs(config, task, unlearning),
      "mask": _mask_inputs(config, masks),
      "devices": devices,
    }
  )
  return Plan({stage.name: stage for stage in (*stages, unlearning)}, keys, "unlearn")


def _unlearning_inputs(
  config: ml_collections.ConfigDict, task: Task, stage: stage_lib.Stage
) -> dict[str, Any]:
  """All that unlearning depends on of the method and of how it is computed."""
  return {
    "method": config.method.to_dict() | {"seed": stage.seed},
    "microbatch": stage.microbatch,
    **task.unlearning_inputs,
    "sam": _sam_inputs(stage.sam),
    "pairing": config.pairing,
  }


def _training(config: Any, task: Task, name: str, indices: np.ndarray) -> stage_lib.Stage:
  options = config.train
  plan = data_lib.training_plan(
    indices,
    batch_size=options.batch_size,
    seed=config.seed,
    reshuffle=options.shuffle == "each_epoch",
  )
  sam = _sam(config.sam, config.sam.train_rho, config.sam.train_mode)
  return stage_lib.Stage(
    name=name,
    method=methods.TRAINING,
    options=options,
    plan=plan,
    hyperparameters=hyperparameters_of(options, methods.TRAINING, sam),
    total_steps=plan.num_steps(options.epochs),
    seed=config.seed,
    train=True,
    training_mode=True,
    microbatch=task.microbatch(True),
    best=task.selection_score if options.select == "best" else None,
    sam=sam,
  )


def _unlearning(config: Any, task: Task, method: methods.Method, split: Paired) -> stage_lib.Stage:
  options, seed = config.method, config_lib.seed_of(config, "method")
  plan = unlearning_batches(method, options, split, seed)
  steps = plan.num_steps(options.epochs)
  training_mode = task.in_training_mode(options)
  sam = _sam(config.sam, config.sam.rho, config.sam.mode)
  return stage_lib.Stage(
    name="unlearn",
    method=method,
    options=options,
    plan=plan,
    hyperparameters=hyperparameters_of(options, method, sam),
    total_steps=min(steps, options.max_steps or steps),
    seed=seed,
    training_mode=training_mode,
    microbatch=task.microbatch(training_mode),
    sam=sam,
    mask_scope=config.mask.scope if MASKED.holds(config) else None,
    keep_every=config.keep_every,
  )


def unlearning_batches(method: methods.Method, options, split: Paired, seed: int):
  """Plans the batches of a method, by its layout."""
  if method.layout == "passes":
    return data_lib.pass_plan(
      split,
      [substep.roles[0] for substep in method.substeps],
      [options[substep.epochs] if substep.epochs else None for substep in method.substeps],
      batch_size=options.batch_size,
      seed=seed,
      shuffle=options.shuffle,
    )
  layout = method.layout
  if layout == "paired" and len(method.roles) == 1:
    (layout,) = method.roles
  return data_lib.unlearning_plan(
    split,
    layout,
    batch_size=options.batch_size,
    seed=seed,
    repeats=options.repeats,
    shuffle=options.shuffle,
    epoch=options.epoch,
  )


def _sam(config, rho: float, mode: str) -> ml_collections.ConfigDict | None:
  """`config.sam` with the radius and mode of a stage, None for plain gradients."""
  if not rho:
    return None
  sam = config.copy_and_resolve_references()
  sam.update(rho=rho, mode=mode)
  return sam


def _sam_inputs(sam) -> dict[str, Any] | None:
  """All that a stage depends on of its sharpness."""
  return sam and {name: sam[name] for name in ("rho", "adaptive", "lamb", "mode", "scope")}


def _mask_inputs(config, masks: dict[str, Any]) -> list[Any] | None:
  """All that a stage depends on of its mask: the content of the file, or the inputs of the mask stage."""
  if not MASKED.holds(config):
    return None
  mask = config.mask
  origin = weights.fingerprint(mask.path) if mask.path else [fingerprint(masks), mask.fraction]
  return [origin, mask.scope]
