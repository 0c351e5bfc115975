"""What a run says before it begins: its model, its sets, its devices, and what the cache already has."""

import jax

from hamu_jax.config import modalities
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
  lacking = {name: stages.lacks(name) for name in stages.keys()}
  computed = ", ".join(name for name, lacks in lacking.items() if lacks)
  cached = ", ".join(name for name, lacks in lacking.items() if not lacks)
  parts = [f"to compute: {computed}"] * bool(computed) + [f"from the cache: {cached}"] * bool(cached)
  return "\n".join(
    [
      f"{config.method.name}: {model}, {trained:,} trained parameters, on {len(prepared.devices)} x {device}",
      f"examples: {len(split.retain):,} to retain, {len(split.forget):,} to forget",
      f"stages {'; '.join(parts)}",
    ]
  )
