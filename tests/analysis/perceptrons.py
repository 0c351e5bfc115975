"""Multilayer perceptrons of random weights on the digits, and what they compute, in float64."""

import numpy as np


def variables(seed):
  rng = np.random.default_rng(seed)
  return {
    "params": {
      "hidden0": {"kernel": rng.normal(size=(64, 64)) / 8, "bias": rng.normal(size=64) / 8},
      "classifier": {"kernel": rng.normal(size=(64, 10)) / 4, "bias": np.zeros(10)},
    },
    "batch_stats": {},
  }


def forward(variables, examples):
  """Hidden features and losses of the perceptron, in float64."""
  p = variables["params"]
  x_NxF = ((examples.images / 255 - 0.3) / 0.4).reshape(len(examples.images), -1)
  features = np.maximum(x_NxF @ p["hidden0"]["kernel"] + p["hidden0"]["bias"], 0)
  logits = features @ p["classifier"]["kernel"] + p["classifier"]["bias"]
  losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), examples.labels]
  return features, losses
