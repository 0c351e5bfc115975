"""Times our steps against PyTorch steps of the same definition, on the same weights and batches.

  pip install -e '.[bench]'
  python benchmarks/against_torch.py
  python benchmarks/against_torch.py --batches=64 --methods=hamu-q

The PyTorch steps are minimal: a functional ResNet with frozen batch norm, two gradients and one update. Both
programs run in one process with as many threads as there are processors, and take turns. A pair is
dropped if other processes used more than 5 % of the machine's processors while it ran. The losses of the
first steps must agree to 1e-5. `--json=FILE` saves the numbers.
"""

import argparse
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import step as own
import torch
from timing import spread
from torch.nn import functional as F

from hamu_jax.run import tables

_DISTURBED = 0.05
_AGREES = 1e-5
_MOST_TRIES = 4
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


def busy_seconds():
  """Seconds that all processors of this machine have been busy so far, and those of this process."""
  user, nice, system, _, _, irq, softirq, *_ = map(int, open("/proc/stat").readline().split()[1:])
  return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), time.process_time()


def timed(function):
  """Wall and CPU seconds of a call, and the share of the machine that others used meanwhile."""
  before, began = busy_seconds(), time.perf_counter()
  jax.block_until_ready(function())
  wall, after = time.perf_counter() - began, busy_seconds()
  cpu = after[1] - before[1]
  return wall, cpu, max(0.0, after[0] - before[0] - cpu) / (wall * os.cpu_count())


def pairs(ours, theirs, rounds):
  """The clean pairs of timings of two functions that take turns, and the number of dropped pairs."""
  found, dropped = [], 0
  while len(found) < rounds and dropped < _MOST_TRIES * rounds:
    pair = timed(ours), timed(theirs)
    if max(share for _, _, share in pair) > _DISTURBED:
      dropped += 1
    else:
      found.append(pair)
  return found, dropped


def compare(args, name, batch):
  """Compares one step, and returns its row of the table and its numbers."""
  args.batch = batch
  request = own.make_request(args)
  _, data, variables, indices = request
  roles = own.methods.METHODS[name].roles
  used = own.Paired(*(index if role in roles else None for role, index in indices._asdict().items()))
  ours = own.make_runner(args, request, name, "sequential")
  theirs = make_torch_step(args, name, Network(variables), data, used)

  state, metrics, _ = ours()
  losses, moved = theirs()
  own_losses = [float(metrics[f"{role}_loss"][0]) for role in roles]
  gap = max(abs(a - b) for a, b in zip(own_losses, losses, strict=True))
  change = max(
    float(jnp.abs(leaf - each.numpy()).max())
    for leaf, each in zip(jax.tree.leaves(state.params), moved, strict=True)
  )
  if gap > _AGREES:
    raise SystemExit(f"{name}, batch {batch}: losses {own_losses} and {losses} differ by {gap:.1e}")
  found, dropped = pairs(ours, theirs, args.rounds)
  result = {"batch": batch, "losses_differ": gap, "weights_differ": change, "dropped": dropped}
  if not found:
    return [name, batch, "-", "-", "-", "-", "-", f"0 ({dropped} dropped)", f"{gap:.0e}"], result
  for place, kind in enumerate(("wall", "cpu")):
    result[kind] = spread([a[place] / b[place] for a, b in found])
  result["seconds"] = [spread([pair[side][0] for pair in found]) for side in range(2)]
  wall = result["wall"]
  seconds = [f"{each['median']:.3f}" for each in result["seconds"]]
  ratio = [
    f"{wall['median']:.2f}",
    f"[{wall['low']:.2f}, {wall['high']:.2f}]",
    f"{result['cpu']['median']:.2f}",
  ]
  return [name, batch, *seconds, *ratio, f"{len(found)} ({dropped} dropped)", f"{gap:.0e}"], result


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--batches", type=lambda text: [int(each) for each in text.split(",")], default=[64, 256]
  )
  parser.add_argument("--methods", type=lambda text: text.split(","), default=["hamu-q", "gdiff", "ft"])
  parser.add_argument("--microbatch", type=int, default=own.models.microbatch_size(32, 32))
  parser.add_argument("--rounds", type=int, default=9, help="clean pairs")
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  args.model, args.size = "resnet20", 32
  torch.set_num_threads(os.cpu_count())
  print(f"load average {os.getloadavg()[0]:.2f} before the first pair; {os.cpu_count()} processors")
  rows, results = [], {}
  for name in args.methods:
    for batch in args.batches:
      row, results[f"{name} {batch}"] = compare(args, name, batch)
      rows.append(row)
  header = ["step", "batch", "ours s", "torch s", "wall", "range", "CPU", "pairs", "losses differ"]
  print(tables.format_table(header, rows))
  if args.json:
    with open(args.json, "w") as file:
      json.dump(results, file, indent=2)


if __name__ == "__main__":
  main()
