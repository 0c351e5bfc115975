"""Times the step of each method and pairing against the floor of two plain gradients.

  python benchmarks/step.py --methods=hamu-q --pairings=sequential,vmap
  python benchmarks/step.py --sam
  python benchmarks/step.py --convolution
  python benchmarks/step.py --topology=v5e:2x2

All figures of a call come from one process with the same loss, convolution path and batch. Floor and steps
take turns, so that ratios are meaningful on a noisy machine. The first form times steps on this machine. The
second times sharpness-aware steps against one plain step. The third times the convolution path of the CPU
against plain `lax.conv`. The fourth compiles the paired step for TPU devices, which need not be present
(extra `tpu`), and prints the compiler's estimates. `--json=FILE` saves the numbers.
"""

import argparse
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import interleave, ratios, ratios_table, spread

from hamu_jax import models
from hamu_jax.config import default as config_lib
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import methods, placement, sub_step
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine import role_gradient as role_gradient_lib
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.train_state import create_state
from hamu_jax.errors import UserError
from hamu_jax.paired import Paired
from hamu_jax.planning import plan
from hamu_jax.planning import vision as vision_plan
from hamu_jax.run import tables
from hamu_jax.vision import feed as feed_lib
from hamu_jax.vision import task as vision

_CLASSES = 10


def make_request(args):
  """Returns model, data, variables and the Paired [1, B] indices of one batch of each role."""
  rng = np.random.default_rng(0)
  shape = (2 * args.batch, args.size, args.size, 3)
  data = feed_lib.ImageData(
    rng.integers(0, 256, shape).astype(np.uint8),
    rng.integers(0, _CLASSES, 2 * args.batch).astype(np.int32),
    np.arange(2 * args.batch) >= args.batch,
    np.arange(2 * args.batch, dtype=np.int32),
  )
  model = models.build_model(args.model, num_classes=_CLASSES)
  variables = model.init(jax.random.key(0), jnp.zeros((1, *shape[1:])), train=False)
  indices = np.arange(2 * args.batch, dtype=np.int32).reshape(2, 1, args.batch)
  return model, data, variables, Paired(*indices)


def make_options(args, name):
  """`config.method` of a method that never stops."""
  options = config_lib.default_config().method
  options.name, options.on_infeasible = name, "project"
  return options


def make_chunk(args, model, name, pairing, mesh=None, rho=0.0, train=False):
  """Returns a chunk as the loop runs it, its program and its hyperparameters."""
  axis = pairing_lib.DATA_AXIS if pairing == "pmap" else None
  options = make_options(args, name)
  program = step_lib.make_step(
    methods.METHODS[name],
    options,
    forward=vision.make_forward(model, (0.5,) * 3, (0.25,) * 3, axis),
    fetch=vision.make_fetch("none"),
    pairing=pairing,
    train=train,
    microbatch=0 if train else args.microbatch,
    schedule=optax.constant_schedule(1.0),
    sharpness=sub_step.Sharpness() if rho else None,
  )
  chunk = chunk_lib.compile_target(chunk_lib.make_chunk(program.step), mesh, methods.METHODS[name].roles)
  return (
    chunk,
    program,
    hyperparameters_of(options, methods.METHODS[name], {"rho": rho, "lamb": 1.0} if rho else None),
  )


def make_runner(args, request, name, pairing, **options):
  """Returns a function without arguments that runs one step; for `request` see `make_request`."""
  model, data, variables, indices = request
  method = methods.METHODS[name]
  mesh = None
  if pairing == "pmap":
    mesh = pairing_lib.make_mesh(jax.devices(), method.device_groups)
  chunk, program, hyperparameters = make_chunk(args, model, name, pairing, mesh, **options)
  used = Paired(*(r if role in method.roles else None for role, r in indices._asdict().items()))
  state, frozen, placed = placement.place(
    (create_state(variables, program.optimizers(hyperparameters), 0), sub_step.Frozen(variables), data), mesh
  )
  if mesh is not None:
    used = pairing_lib.shard_indices(used, mesh)
  batches = placement.place_batches(used, np.zeros(1, np.int32), mesh)
  return lambda: chunk(state, frozen, placed, batches, jnp.int32(1), hyperparameters)


def make_plain(args, model, *, train=False, microbatch=None):
  """Returns a function (variables, data, indices [B]) -> RoleSums that computes one plain gradient."""
  role = role_gradient_lib.role_gradient(
    vision.make_forward(model, (0.5,) * 3, (0.25,) * 3, None),
    vision.make_fetch("none"),
    ("ce",),
    train=train,
    microbatch=args.microbatch if microbatch is None else microbatch,
  )

  def plain(variables, data, indices):
    key = jax.random.key(0)
    inputs = role_gradient_lib.Inputs({}, None, data, key, key, {})
    return role(variables, inputs, indices, {"ce": jnp.float32(1)})

  return plain


def time_steps(args):
  """Prints and returns the ratios of each method and pairing to two plain gradients."""
  model, data, variables, indices = make_request(args)
  data = jax.device_put(data)
  plain = make_plain(args, model)

  @jax.jit
  def floor(variables, data, indices):
    return [plain(variables, data, role_indices[0]).gradient for role_indices in indices]

  device_indices = jax.device_put(indices)
  functions = {"floor": lambda: floor(variables, data, device_indices)}
  for name in args.methods:
    for pairing in args.pairings:
      functions[f"{name} {pairing}"] = make_runner(args, (model, data, variables, indices), name, pairing)
  return print_ratios(args, interleave(functions, args.rounds), "floor")


def time_sharpness(args):
  """Prints and returns the ratios of sharpness-aware steps to one plain step, for both batch norm modes."""
  request = make_request(args)
  results = {}
  for mode, train in (("frozen", False), ("training", True)):
    functions = {
      f"{mode} ft": make_runner(args, request, "ft", "sequential", train=train),
      f"{mode} ft with SAM": make_runner(args, request, "ft", "sequential", train=train, rho=0.1),
      f"{mode} neggrad with SAM": make_runner(args, request, "neggrad", "sequential", train=train, rho=0.1),
      f"{mode} hamu-q with SAM": make_runner(args, request, "hamu-q", "sequential", train=train, rho=0.1),
    }
    results |= print_ratios(args, interleave(functions, args.rounds), f"{mode} ft")
  return results


def print_ratios(args, timed, base):
  """Prints and returns the seconds of each function and their ratios to those of `base`."""
  seconds, _ = timed
  results = ratios(seconds, base)
  print(f"{args.model}, {args.size}x{args.size}, batch {args.batch} a role, {args.rounds} rounds")
  print(ratios_table(results, base))
  return results


def time_convolution(args):
  """Times the model's own convolution path against `lax.conv`, for frozen and training batch norm."""
  own, data, variables, indices = make_request(args)
  other = models.build_model(args.model, num_classes=_CLASSES, platform="tpu")
  data = jax.device_put(data)
  functions = {}
  gradients = {}
  for mode, train in (("frozen", False), ("training", True)):
    for name, model, microbatch in (("lax.conv", other, 0), ("own", own, args.microbatch)):
      plain = jax.jit(make_plain(args, model, train=train, microbatch=0 if train else microbatch))
      functions[f"{mode} {name}"] = lambda f=plain: f(variables, data, indices.retain[0])
      gradients[f"{mode} {name}"] = functions[f"{mode} {name}"]().gradient
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients[f"{mode} own"]))
    error = max(
      jax.tree.leaves(
        jax.tree.map(
          lambda a, b: float(jnp.abs(a - b).max()),
          gradients[f"{mode} own"],
          gradients[f"{mode} lax.conv"],
        )
      )
    )
    print(f"{mode}: gradients differ by at most {error / scale:.1e} of the largest entry")
  seconds, _ = interleave(functions, args.rounds)
  results, table = {}, []
  for name, values in seconds.items():
    base = seconds[f"{name.split()[0]} lax.conv"]
    speedup = spread([b / value for value, b in zip(values, base, strict=True)])
    results[name] = {"images_per_second": args.batch / statistics.median(values), "speedup": speedup}
    table.append(
      [
        name,
        f"{results[name]['images_per_second']:.0f}",
        f"{speedup['median']:.2f}",
        f"{speedup['low']:.2f}",
        f"{speedup['high']:.2f}",
      ]
    )
  print(f"{args.model}, {args.size}x{args.size}, batch {args.batch}, microbatch {args.microbatch}")
  print(tables.format_table(["forward+backward", "images/s", "speed-up", "low", "high"], table))
  return results


def make_stage(args, name, devices):
  """Returns the abstract stage of a method, with half of the devices for each role."""
  config = config_lib.default_config()
  config.data.update(image_size=args.size, train_size=2 * args.batch, forget="random", forget_fraction=0.5)
  config.model.name, config.pairing = args.model, "pmap"
  config.method, config.method.batch_size = make_options(args, name), args.batch
  config.train.batch_size = args.batch
  return vision_plan.AbstractStage(config, devices)


def compile_for_topology(args):
  """Compiles the paired step for TPU devices and prints the compiler's estimates."""
  target = plan.find_target(args.topology)
  if target.simulated:
    raise UserError("--topology: libtpu is missing; pip install 'hamu-jax[tpu]'")
  stages = {
    name: make_stage(args, name, target.devices)
    for name in args.methods
    if methods.METHODS[name].device_groups == 2 and not methods.METHODS[name].for_language
  }
  if not stages:
    raise UserError(f"--methods={','.join(args.methods)}: none of them pairs two gradients; try hamu-q")
  first = next(iter(stages.values()))
  programs = {"two plain gradients": (first, first.plain())}
  programs |= {f"{name} step": (stage, stage.step()) for name, stage in stages.items()}
  results, table = {}, []
  for name, (stage, lowered) in programs.items():
    analysis = plan.analyse(lowered, target, stage.trips)
    collectives = {}
    for one in analysis.cost.collectives.values():
      count, size = collectives.get(one.kind, (0, 0))
      collectives[one.kind] = count + one.times, size + one.times * one.size
    result = results[name] = {
      "argument_bytes": analysis.arguments,
      "temporary_bytes": analysis.temporaries,
      "output_bytes": analysis.outputs,
      "collectives": collectives,
      "estimated_cycles": analysis.cost.cycles,
    }
    result["ratio"] = result["estimated_cycles"] / results["two plain gradients"]["estimated_cycles"]
    moved = ", ".join(f"{count} {kind} {size / 2**20:.2f} MiB" for kind, (count, size) in collectives.items())
    table.append(
      [
        name,
        *(f"{result[key] / 2**20:.1f}" for key in ("argument_bytes", "temporary_bytes", "output_bytes")),
        f"{plan.computing(analysis, target) * 1e6:.0f}",
        f"{result['ratio']:.2f}",
        moved,
      ]
    )
  print(f"{args.model}, batch {args.batch} a role, compiled for {args.topology}")
  print(
    tables.format_table(
      ["program", "argument MiB", "temporary MiB", "output MiB", "estimated us", "ratio", "collectives"],
      table,
    )
  )
  return results


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", default="resnet20")
  parser.add_argument("--size", type=int, default=32, help="image height and width")
  parser.add_argument("--batch", type=int, default=256, help="examples of a role")
  parser.add_argument(
    "--microbatch", type=int, default=16, help="examples of a microbatch; 0 does not split the batch"
  )
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--methods", type=lambda text: text.split(","), default=list(methods.METHODS))
  parser.add_argument("--pairings", type=lambda text: text.split(","), default=["sequential", "vmap"])
  parser.add_argument("--sam", action="store_true", help="time sharpness-aware steps")
  parser.add_argument("--convolution", action="store_true", help="time the convolution path")
  parser.add_argument("--topology", help="compile for a TPU topology such as v5e:2x2")
  parser.add_argument("--json", help="file for the numbers")
  args = parser.parse_args()
  run = time_steps
  if args.topology:
    run = compile_for_topology
  elif args.convolution or args.sam:
    run = time_convolution if args.convolution else time_sharpness
  results = run(args)
  if args.json:
    with open(args.json, "w") as file:
      json.dump({"arguments": vars(args), "results": results}, file, indent=2)


if __name__ == "__main__":
  main()
