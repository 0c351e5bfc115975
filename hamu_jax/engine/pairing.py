"""Where the two gradients of a step are computed.

One per-role function, `role_gradient.role_gradient`, is applied to both roles in three ways:

- `sequential`: it is called for one role after the other, and compiled once if both have the same terms;
- `vmap`: it is mapped over a leading axis of two on one device;
- `pmap`: the first half of the devices takes the retain batch and the second half the forget batch.
  Each half reduces its own sums, then the halves exchange once, so that every device holds both
  gradients. A method with one role uses all devices for it.

`pmap` is implemented by a `shard_map` over a mesh with axes ("role", "data", "weights"), as `jax.pmap` itself
is, because this also compiles ahead of time for a topology and spans several hosts. Devices along "weights"
share one copy of frozen weights that are too large for one device. They split a batch as those along "data".
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax import lax

from hamu_jax.engine import role_gradient as role_gradient_lib
from hamu_jax.errors import UserError
from hamu_jax.paired import Paired

ROLE_AXIS = "role"
DATA_AXIS = "data"
WEIGHTS_AXIS = "weights"
# Axes over which the batch of a role is split.
SHARE_AXES = (DATA_AXIS, WEIGHTS_AXIS)
Tree = Any


class RoleMeans(NamedTuple):
  """Means over the batch of one role.

  Attributes:
    gradient: gradient of the mean objective.
    values: means of the logged quantities: `ce`, `accuracy` and the terms of the objective.
    batch_stats: running statistics after the batch.
  """

  gradient: Tree
  values: dict[str, jax.Array]
  batch_stats: Tree


def choose_devices(devices, pairing: str, wanted: int) -> tuple[Any, ...]:
  """Chooses the devices that work on a step.

  Args:
    devices: available devices.
    pairing: `sequential`, `vmap` or `pmap`; the first two use one device.
    wanted: number of devices for `pmap`; 0 for all.

  Raises:
    UserError: fewer devices are available.
  """
  if pairing != "pmap":
    return tuple(devices[:1])
  wanted = wanted or len(devices)
  if wanted > len(devices):
    raise UserError(f"config.devices={wanted}: there are {len(devices)}; lower it, or 0 for all")
  return tuple(devices[:wanted])


def make_mesh(devices, roles: int, weights: int = 1) -> jax.sharding.Mesh:
  """Arranges devices in a mesh ("role", "data", "weights"), with as many devices for each role.

  Args:
    devices: devices of the mesh.
    roles: number of groups of devices, 1 or 2.
    weights: number of devices that share one copy of the frozen weights.

  Raises:
    UserError: the devices cannot be divided evenly.
  """
  devices = np.asarray(devices)
  if devices.size % roles:
    raise UserError(
      f"config.devices: pairing 'pmap' needs an even number of devices, one half a role, but got "
      f"{devices.size}; set config.devices to an even number or config.pairing to 'sequential'"
    )
  if devices.size // roles % weights:
    raise UserError(
      f"config.mesh.weights={weights}: {devices.size // roles} devices of a role cannot be split into "
      "groups of so many; choose a divisor"
    )
  return jax.sharding.Mesh(devices.reshape(roles, -1, weights), (ROLE_AXIS, DATA_AXIS, WEIGHTS_AXIS))


def shard_indices(indices: Paired, mesh: jax.sharding.Mesh) -> np.ndarray:
  """Splits the indices of batches among devices.

  Args:
    indices: for each role [n, B] int32 indices of n batches, or None.
    mesh: mesh of `make_mesh`. With a role axis of two, the batches of each role go to its half of the
      devices. With a role axis of one, all batches go to all devices.

  Returns:
    [n, present roles, devices a role, b] int32, b the largest share. Shorter shares are padded with -1.
  """
  present = [batch_indices for batch_indices in indices if batch_indices is not None]
  shards = mesh.devices[0].size
  share = -(-max(batch_indices.shape[1] for batch_indices in present) // shards)

  def split(batch_indices):
    count, size = batch_indices.shape
    padded = np.full((count, shards * share), -1, np.int32)
    padded[:, :size] = batch_indices
    # Interleaved, so that the padding of a short batch is spread over the devices.
    return padded.reshape(count, share, shards).transpose(0, 2, 1)

  return np.stack([split(batch_indices) for batch_indices in present], axis=1)


def own_indices(indices: jax.Array, roles: tuple[str, ...], mesh: jax.sharding.Mesh) -> Paired:
  """The indices of one device by role; runs inside `shard_map`.

  Args:
    indices: [n, r, 1, b] indices of the device, its part of the result of `shard_indices`.
    roles: roles of these indices.
    mesh: mesh of `shard_indices`. With a role axis of two, a device has indices of its own role only, which
      are returned for both roles.

  Returns:
    Paired [n, b] indices; None for a role without a batch.
  """
  if mesh.devices.shape[0] == 2:
    return Paired(indices[:, 0, 0], indices[:, 0, 0])
  by_role = {role: indices[:, index, 0] for index, role in enumerate(roles)}
  return Paired(by_role.get("retain"), by_role.get("forget"))


def anywhere(condition: jax.Array, pairing: str) -> jax.Array:
  """Whether any element is true, under `pmap` on any device: the same answer on all devices."""
  found = jnp.any(condition)
  if pairing == "pmap":
    found = lax.psum(found.astype(jnp.int32), (ROLE_AXIS, *SHARE_AXES)) > 0
  return found


def _means(sums: role_gradient_lib.RoleSums) -> RoleMeans:
  """Divides sums by their counts; a batch of padding gives zeros."""
  count = jnp.maximum(sums.count, 1)
  gradient = jax.tree.map(lambda leaf: leaf / count, sums.gradient)
  values = {name: value.total / jnp.maximum(value.count, 1) for name, value in sums.values.items()}
  return RoleMeans(gradient, values, sums.batch_stats)


def _role_means(function, sharpen, reduce=lambda sums: sums):
  """Makes the function of the means of one role's batch, with a sharpened gradient.

  Args:
    function: function of `role_gradient.role_gradient`.
    sharpen: see `make_gradients`.
    reduce: (RoleSums) -> RoleSums, added over all devices that have a part of the batch.
  """

  def means(variables, inputs, index_B, coefficients):
    def at(params, coefficients):
      return _means(reduce(function({**variables, "params": params}, inputs, index_B, coefficients)))

    return sharpen(at)(variables["params"], coefficients)

  return means


def _one_by_one(role_function, terms: Paired, sharpen, reduce=lambda sums: sums):
  """Computes one role after the other, each on one device or on all devices."""
  functions = [
    None if names is None else _role_means(role_function(names), sharpen, reduce) for names in terms
  ]

  def gradients(variables, inputs, indices, coefficients):
    return Paired(
      *(
        None if function is None else function(variables, inputs, role_indices, role_coefficients)
        for function, role_indices, role_coefficients in zip(functions, indices, coefficients, strict=True)
      )
    )

  return gradients


def _sum_over_devices(sums: role_gradient_lib.RoleSums) -> role_gradient_lib.RoleSums:
  """Adds the sums of all devices of a batch; their batch statistics are equal already."""
  # One vector takes one collective, whatever the number of tensors.
  vector, restore = jax.flatten_util.ravel_pytree(sums._replace(batch_stats=()))
  return restore(lax.psum(vector, SHARE_AXES))._replace(batch_stats=sums.batch_stats)


def _union(terms: Paired) -> tuple[str, ...]:
  return tuple(sorted(set(terms.retain) | set(terms.forget)))


def _stack_coefficients(coefficients: Paired, names: tuple[str, ...]):
  """Coefficients {term: [2]} of both roles; 0 for a term that a role does not have."""
  return {name: jnp.stack([jnp.asarray(role.get(name, 0.0)) for role in coefficients]) for name in names}


def _stacked(role_function, terms: Paired, sharpen, map_roles):
  """Computes both roles with one function, which is traced and compiled once.

  Args:
    role_function: see `make_gradients`.
    terms: see `make_gradients`.
    sharpen: see `make_gradients`.
    map_roles: (function of (indices, coefficients)) -> that function mapped over their leading axis.
  """
  union = _union(terms)
  means = _role_means(role_function(union), sharpen)

  def gradients(variables, inputs, indices, coefficients):
    size = max(len(index_B) for index_B in indices)
    # Roles of different sizes are padded to one.
    padded = [jnp.pad(index_B, (0, size - len(index_B)), constant_values=-1) for index_B in indices]
    mapped = map_roles(lambda role: means(variables, inputs, *role))
    both = mapped((jnp.stack(padded), _stack_coefficients(coefficients, union)))
    return Paired(*(jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in range(2)))

  return gradients


def _sequential(role_function, terms: Paired, sharpen):
  """Computes one role after the other."""
  separate = _one_by_one(role_function, terms, sharpen)
  if terms.retain != terms.forget:
    return separate
  in_turn = _stacked(role_function, terms, sharpen, lambda function: functools.partial(lax.map, function))

  def gradients(variables, inputs, indices, coefficients):
    # Padding the smaller role would cost time in each step.
    same_size = len(indices.retain) == len(indices.forget)
    return (in_turn if same_size else separate)(variables, inputs, indices, coefficients)

  return gradients


def _device_halves(role_function, terms: Paired, sharpen, train: bool, exchanges: bool):
  """Computes the role of a device's half, then exchanges gradients; runs inside `shard_map`."""
  union = _union(terms)
  names = sorted({"ce", "accuracy", *union})

  def branch(role_terms):
    function = role_function(role_terms)

    def run(variables, inputs, index_b, coefficients):
      own = {name: coefficients[name] for name in role_terms}
      sums = function(variables, inputs, index_b, own)
      # Both branches must return the same structure. `own_values` removes the added terms.
      nothing = role_gradient_lib.Sum(jnp.zeros_like(sums.count), jnp.zeros_like(sums.count))
      return sums._replace(values={name: sums.values.get(name, nothing) for name in names})

    return run

  if train or exchanges or terms.retain == terms.forget:
    # Training statistics and shared weights need collectives of a half, which a conditional cannot contain.
    own_sums = role_function(union)
  else:
    retain, forget = (branch(role_terms) for role_terms in terms)

    def own_sums(*arguments):
      return lax.cond(lax.axis_index(ROLE_AXIS) == 1, forget, retain, *arguments)

  own_means = _role_means(own_sums, sharpen, _sum_over_devices)

  def own_values(means, names):
    logged = {"ce", "accuracy", *names}
    return means._replace(values={name: means.values[name] for name in sorted(logged)})

  def gradients(variables, inputs, indices, coefficients):
    is_forget = lax.axis_index(ROLE_AXIS) == 1
    chosen = {
      name: values[is_forget.astype(jnp.int32)]
      for name, values in _stack_coefficients(coefficients, union).items()
    }
    # Each half has the indices of its own role under both names.
    means = own_means(variables, inputs, indices.retain, chosen)
    # Frozen statistics need no exchange.
    moving = means if train else means._replace(batch_stats=())
    vector, restore = jax.flatten_util.ravel_pytree(moving)
    other = lax.ppermute(vector, ROLE_AXIS, [(0, 1), (1, 0)])
    both = jnp.where(is_forget, other, vector), jnp.where(is_forget, vector, other)
    restored = [restore(vector) for vector in both]
    if not train:
      restored = [role._replace(batch_stats=means.batch_stats) for role in restored]
    return Paired(
      *(own_values(role_means, role_terms) for role_means, role_terms in zip(restored, terms, strict=True))
    )

  return gradients


def make_gradients(
  pairing: str,
  role_function,
  terms: Paired,
  *,
  train: bool,
  sharpen=lambda at: at,
  exchanges: bool = False,
):
  """Makes the function of the gradients of both roles.

  Args:
    pairing: `sequential`, `vmap` or `pmap`.
    role_function: (terms) -> the function of `role_gradient.role_gradient`.
    terms: names of the terms of each role, or None for a role that is not used.
    train: whether batch statistics move, so that the halves of `pmap` must exchange them.
    sharpen: maps a function (params, coefficients) -> RoleMeans to one whose gradient is sharpness-aware; the
      identity by default.
    exchanges: whether the devices of a half exchange something within the per-role function.

  Returns:
    (variables, Inputs, indices, coefficients) -> Paired RoleMeans, None for a role that is not used.
    `indices` and `coefficients` are Paired. Under `pmap` the indices are those of `own_indices`, and the
    function must run inside `shard_map` over a mesh of `make_mesh`.
  """
  both = None not in terms
  if pairing == "pmap":
    if both:
      return _device_halves(role_function, terms, sharpen, train, exchanges)
    return _one_by_one(role_function, terms, sharpen, _sum_over_devices)
  if pairing == "vmap" and both:
    return _stacked(role_function, terms, sharpen, jax.vmap)
  return _sequential(role_function, terms, sharpen)
