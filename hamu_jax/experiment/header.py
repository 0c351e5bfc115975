"""What a run says before it begins: its model, its sets, its devices, and what the cache already has."""

import jax

from hamu_jax.config import modalities
from hamu_jax.experiment import memorization, stage_plan
from hamu_jax.experiment.stages import Stages


def header(stages: Stages) -> str:
  """Three lines about an experiment that is about to run.

  Args:
    stages: its stages.
  """
  prepared = stages.prepared
  config, split = prepared.config, prepared.split
  text = modalities.is_language(config)
  model = (config.language.path or config.language.preset) if text else config.model.name
  trained = sum(leaf.size for leaf in jax.tree.leaves(prepared.template["params"]))
  device = prepared.devices[0].device_kind
  computed, cached = map(", ".join, _stages(stages))
  parts = [f"to compute: {computed}"] * bool(computed) + [f"from the cache: {cached}"] * bool(cached)
  return "\n".join(
    [
      f"{config.method.name}: {model}, {trained:,} trained parameters, on {len(prepared.devices)} x {device}",
      f"examples: {len(split.retain):,} to retain, {len(split.forget):,} to forget",
      f"stages {'; '.join(parts)}",
    ]
  )


def _stages(stages: Stages) -> tuple[list[str], list[str]]:
  """The stages to compute, with their steps, and those in the cache."""
  plan, computed, cached = stages.prepared.plan, [], []
  if count := _lacking_models(stages):
    computed.append(f"memorization ({count} models)")
  names = list(stages.keys())
  if stages.prepared.makes_mask:
    names.insert(names.index("unlearn"), "mask")
  for name in names:
    if not stages.lacks(name):
      cached.append(name)
    elif name in plan.stages:
      steps = plan.stages[name].total_steps
      computed.append(f"{name} ({steps:,} step{'s' * (steps != 1)})")
    else:
      computed.append(name)
  return computed, cached


def _lacking_models(stages: Stages) -> int:
  """The number of models to train of an ensemble that is yet to choose the forget set."""
  prepared = stages.prepared
  config, request = prepared.config, prepared.task.request
  if not request.estimates_scores or prepared.scores is not None:
    return 0
  inputs = stage_plan.model_inputs(config, prepared.task)
  keys = memorization.keys(config.memorization, request.available, inputs, config.seed)
  return len(memorization.unfinished(keys, stages.cache))
