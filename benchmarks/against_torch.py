"""Times our steps against PyTorch steps of the same definition, on the same weights and batches.

  pip install -e '.[bench]'
  python benchmarks/against_torch.py
  python benchmarks/against_torch.py --only=images --batches=64 --methods=hamu-q

The PyTorch steps are minimal: a functional ResNet with frozen batch norm, two gradients and one update. For
texts it is the gradient of a LoRA adapter of a Llama with 34 million parameters, by transformers and PEFT.
Both programs run in one process with as many threads as there are processors, and take turns. A pair is
dropped if other processes used more than 5 % of the machine's processors while it ran. The losses must
agree to 1e-5. `--json=FILE` saves the numbers.
"""

import argparse
import json
import os

import jax
import numpy as np
import peft_gradient
import step as own
import torch
from timing import clean_pairs, spread
from torch.nn import functional as F

from hamu_jax.run import tables

_AGREES = 1e-5
_EPSILON = 1e-5
_MEAN, _DEVIATION = 0.5, 0.25


class Network:
  """The ResNet of `models.resnet.ResNet` in evaluation mode, as a function of a list of tensors.

  Args:
    variables: variables of the linen module, which name the layers.
  """

  def __init__(self, variables):
    flat, self._structure = jax.tree.flatten(variables["params"])
    self.parameters = [torch.tensor(np.asarray(leaf)) for leaf in flat]
    self._statistics = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), variables["batch_stats"])
    self._blocks = sorted(name for name in variables["params"] if "block" in name)

  def __call__(self, parameters, images):
    """Logits of [B, H, W, C] uint8 images."""
    params = jax.tree.unflatten(self._structure, parameters)
    x = ((images.permute(0, 3, 1, 2) / 255 - _MEAN) / _DEVIATION).contiguous()
    x = F.relu(self._conv_norm(params["stem"], self._statistics["stem"], x))
    for name in self._blocks:
      layers, statistics = params[name], self._statistics[name]
      stride = 2 if "shortcut" in layers else 1
      y = F.relu(self._conv_norm(layers["conv0"], statistics["conv0"], x, stride))
      y = self._conv_norm(layers["conv1"], statistics["conv1"], y)
      if stride > 1:
        x = self._conv_norm(layers["shortcut"], statistics["shortcut"], x, stride)
      x = F.relu(x + y)
    return x.mean((2, 3)) @ params["classifier"]["kernel"] + params["classifier"]["bias"]

  @staticmethod
  def _conv_norm(layer, statistics, x, stride=1):
    # Our kernels are stored as [K, K, C, O]; PyTorch's products read [O, C, K, K].
    kernel = layer["kernel"].permute(3, 2, 0, 1)
    x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
    norm, own_statistics = layer["norm"], statistics["norm"]
    return F.batch_norm(
      x, own_statistics["mean"], own_statistics["var"], norm["scale"], norm["bias"], eps=_EPSILON
    )


def hamu_q(retain, forget, rate, constraint):
  """hamu-q's steps with the learning-rate radius, shares by gradient norms, and projection if infeasible."""
  weights = [float(r.norm() * f.norm()) for r, f in zip(retain, forget, strict=True)]
  steps = []
  for r, f, weight in zip(retain, forget, weights, strict=True):
    c, radius = constraint * weight / sum(weights), rate * r.norm()
    forget_norm, dot = f.norm(), (r * f).sum()
    if radius * dot <= -c * r.norm():
      steps.append(-rate * r)
    elif c / forget_norm > radius:
      steps.append(radius * f / forget_norm)
    else:
      orthogonal = r - dot / forget_norm**2 * f
      sideways = (radius**2 - c**2 / forget_norm**2).sqrt()
      steps.append(c / forget_norm**2 * f - sideways * orthogonal / orthogonal.norm())
  return steps


def make_torch_step(args, name, network, data, indices):
  """A function without arguments that runs a step from the first weights and returns the losses by role."""
  options = own.make_options(args, name)
  images, labels = torch.tensor(data.images), torch.tensor(data.labels).long()
  rate = options.optimizer.learning_rate
  roles = [torch.tensor(role[0]).long() for role in indices if role is not None]
  start = network.parameters

  def gradient(index):
    parameters = [each.detach().requires_grad_() for each in start]
    loss = F.cross_entropy(network(parameters, images[index]), labels[index])
    return loss, torch.autograd.grad(loss, parameters)

  def step():
    losses, gradients = zip(*map(gradient, roles), strict=True)
    with torch.no_grad():
      if name == "ft":
        steps = [-rate * g for g in gradients[0]]
      elif name == "gdiff":
        steps = [-rate * (r - f) / 2 for r, f in zip(*gradients, strict=True)]
      else:
        steps = hamu_q(*gradients, rate, rate * options.constraint_ratio)
      moved = [each + change for each, change in zip(start, steps, strict=True)]
    return [float(loss.detach()) for loss in losses], moved

  return step


def time_pairs(args, name, size, ours, theirs, gap):
  """Times two functions, and returns the row of the table and the numbers."""
  if gap > _AGREES:
    raise SystemExit(f"{name}, {size}: the losses differ by {gap:.1e}")
  found, dropped = clean_pairs(ours, theirs, args.rounds)
  result = {"losses_differ": gap, "dropped": dropped}
  pairs = f"{len(found)} ({dropped} dropped)"
  if not found:
    return [name, size, "-", "-", "-", "-", "-", pairs, f"{gap:.0e}"], result
  for place, kind in enumerate(("wall", "cpu")):
    result[kind] = spread([a[place] / b[place] for a, b in found])
  result["seconds"] = [spread([pair[side][0] for pair in found]) for side in range(2)]
  seconds = [f"{each['median']:.3f}" for each in result["seconds"]]
  wall, cpu = result["wall"], result["cpu"]
  ratios = [f"{wall['median']:.2f}", f"[{wall['low']:.2f}, {wall['high']:.2f}]", f"{cpu['median']:.2f}"]
  return [name, size, *seconds, *ratios, pairs, f"{gap:.0e}"], result


def compare_images(args, name, batch):
  """Compares one step of an image model."""
  args.batch = batch
  request = own.make_request(args)
  _, data, variables, indices = request
  roles = own.methods.METHODS[name].roles
  used = own.Paired(*(index if role in roles else None for role, index in indices._asdict().items()))
  ours = own.make_runner(args, request, name, "sequential")
  theirs = make_torch_step(args, name, Network(variables), data, used)
  own_losses = [float(ours()[1][f"{role}_loss"][0]) for role in roles]
  gap = max(abs(a - b) for a, b in zip(own_losses, theirs()[0], strict=True))
  return time_pairs(args, name, f"batch {batch}", ours, theirs, gap)


def compare_texts(args, dropout):
  """Compares the gradient of an adapter."""
  ours, theirs = peft_gradient.make_pair(args, 0.0)
  gap = abs(float(ours()[0]) - float(theirs()[0]))
  if dropout:  # The masks differ, and with them the losses.
    ours, theirs = peft_gradient.make_pair(args, dropout)
    ours(), theirs()
  return time_pairs(
    args, f"LoRA, dropout {dropout}", f"{args.rows} x {args.row_length} tokens", ours, theirs, gap
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", choices=("images", "texts"), help="compare only these")
  parser.add_argument(
    "--batches", type=lambda text: [int(each) for each in text.split(",")], default=[64, 256]
  )
  parser.add_argument("--methods", type=lambda text: text.split(","), default=["hamu-q", "gdiff", "ft"])
  parser.add_argument("--microbatch", type=int, default=own.models.microbatch_size(32, 32))
  parser.add_argument("--rows", type=int, default=8, help="texts")
  parser.add_argument("--row-length", type=int, default=128, help="tokens of a text")
  parser.add_argument("--row-microbatch", type=int, default=1, help="rows computed at a time")
  parser.add_argument("--rounds", type=int, default=9, help="clean pairs")
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  args.model, args.size = "resnet20", 32
  torch.set_num_threads(os.cpu_count())
  print(f"load average {os.getloadavg()[0]:.2f} before the first pair; {os.cpu_count()} processors")
  compared = []
  if args.only != "texts":
    compared += [compare_images(args, name, batch) for name in args.methods for batch in args.batches]
  if args.only != "images":
    compared += [compare_texts(args, dropout) for dropout in (0.0, 0.05)]
  header = ["step", "of", "ours s", "theirs s", "wall", "range", "CPU", "pairs", "losses differ"]
  print(tables.format_table(header, [row for row, _ in compared]))
  if args.json:
    with open(args.json, "w") as file:
      json.dump({" ".join(row[:2]): result for row, result in compared}, file, indent=2)


if __name__ == "__main__":
  main()
