"""Where the two gradients of a step are computed.

One per-role function, `role_gradient.role_gradient`, is mapped in three ways:

- `sequential`: called once a role, one after the other;
- `vmap`: mapped over a leading axis of two on one device;
- `pmap`: the first half of the devices takes the retain batch and the second half the forget batch.
  Each half reduces its own sums, then the halves exchange once, so that every device holds both
  gradients. A method with one role uses all devices for it.

The `pmap` form is a `shard_map` over a mesh with axes ("role", "data", "weights") - what `jax.pmap`
itself is built on - because that also compiles ahead of time for a topology, and spans several hosts.
Devices along "weights" share one copy of what is too large for each to have its own, and their batch.
"""

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
# Among whose devices a role's batch is split.
SHARE_AXES = (DATA_AXIS, WEIGHTS_AXIS)
Tree = Any


class RoleMeans(NamedTuple):
  """One role's batch, reduced over all its examples.

  Attributes:
    gradient: gradient of the mean objective.
    values: means of the logged quantities (`ce`, `accuracy`, and the terms used).
    batch_stats: running statistics after the batch.
  """

  gradient: Tree
  values: dict[str, jax.Array]
  batch_stats: Tree


def choose_devices(devices, pairing: str, wanted: int) -> tuple[Any, ...]:
  """The devices that work on a step: all for `pmap`, or as many as asked for; one for other pairings.

  Raises:
    UserError: there are not so many.
  """
  if pairing != "pmap":
    return tuple(devices[:1])
  wanted = wanted or len(devices)
  if wanted > len(devices):
    raise UserError(f"config.devices={wanted}: there are {len(devices)}; lower it, or 0 for all")
  return tuple(devices[:wanted])


def make_mesh(devices, roles: int, weights: int = 1) -> jax.sharding.Mesh:
  """Arranges devices as ("role", "data", "weights"): an equal share for each of 1 or 2 roles.

  Args:
    devices: any number that can be shared out.
    roles: 1 or 2.
    weights: devices that share one copy of the frozen weights.

  Raises:
    UserError: the devices cannot be shared out evenly.
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
  """Splits batches among devices.

  Args:
    indices: for each role [n, B] int32 examples of n batches, or None.
    mesh: as made by `make_mesh`. With an axis of two roles each batch goes to its own half of the
      devices, with one each batch goes to all devices.

  Returns:
    [n, present roles, devices a role, b] int32, b the largest share; shorter ones are padded with -1.
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
  """Inside `shard_map`: a device's own examples, by role.

  Args:
    indices: [n, r, 1, b], its part of what `shard_indices` made.
    roles: the roles whose examples these are.
    mesh: the mesh of that `shard_indices`. With an axis of two roles a device has the examples of its own
      role alone, and they stand for both.

  Returns:
    Paired [n, b]; None for a role without examples.
  """
  if mesh.devices.shape[0] == 2:
    return Paired(indices[:, 0, 0], indices[:, 0, 0])
  by_role = {role: indices[:, index, 0] for index, role in enumerate(roles)}
  return Paired(by_role.get("retain"), by_role.get("forget"))


def anywhere(condition: jax.Array, pairing: str) -> jax.Array:
  """Whether it holds of any element, under `pmap` of any device's: the same answer on all of them."""
  found = jnp.any(condition)
  if pairing == "pmap":
    found = lax.psum(found.astype(jnp.int32), (ROLE_AXIS, *SHARE_AXES)) > 0
  return found


def _means(sums: role_gradient_lib.RoleSums) -> RoleMeans:
  """Divides sums by their counts; an all-padding batch gives zeros."""
  count = jnp.maximum(sums.count, 1)
  gradient = jax.tree.map(lambda leaf: leaf / count, sums.gradient)
  values = {name: value.total / jnp.maximum(value.count, 1) for name, value in sums.values.items()}
  return RoleMeans(gradient, values, sums.batch_stats)


def _role_means(function, sharpen, reduce=lambda sums: sums):
  """The means of one role's batch, its gradient sharpened.

  Args:
    function: what `role_gradient.role_gradient` builds.
    sharpen: see `make_gradients`.
    reduce: adds the sums of all devices that have a part of the batch.
  """

  def means(variables, inputs, index_B, coefficients):
    def at(params, coefficients):
      return _means(reduce(function({**variables, "params": params}, inputs, index_B, coefficients)))

    return sharpen(at)(variables["params"], coefficients)

  return means


def _one_by_one(role_function, terms: Paired, sharpen, reduce=lambda sums: sums):
  """One role after the other, each on one device or on all of them."""
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
  """Adds the parts of a batch; batch statistics are the same on all its devices already."""
  # As one vector it takes one collective, whatever the number of tensors.
  vector, restore = jax.flatten_util.ravel_pytree(sums._replace(batch_stats=()))
  return restore(lax.psum(vector, SHARE_AXES))._replace(batch_stats=sums.batch_stats)


def _union(terms: Paired) -> tuple[str, ...]:
  return tuple(sorted(set(terms.retain) | set(terms.forget)))


def _stack_coefficients(coefficients: Paired, names: tuple[str, ...]):
  """{term: [2]} for all names, 0 for a term that a role does not have."""
  return {name: jnp.stack([jnp.asarray(role.get(name, 0.0)) for role in coefficients]) for name in names}


def _vmap(role_function, terms: Paired, sharpen):
  union = _union(terms)
  mapped = jax.vmap(_role_means(role_function(union), sharpen), in_axes=(None, None, 0, 0))

  def gradients(variables, inputs, indices, coefficients):
    means = mapped(variables, inputs, jnp.stack(indices), _stack_coefficients(coefficients, union))
    return Paired(*(jax.tree.map(lambda leaf, i=i: leaf[i], means) for i in range(2)))

  return gradients


def _device_halves(role_function, terms: Paired, sharpen, train: bool, exchanges: bool):
  """The body that runs on each device, inside `shard_map` over (role, data)."""
  union = _union(terms)
  names = sorted({"ce", "accuracy", *union})

  def branch(role_terms):
    function = role_function(role_terms)

    def run(variables, inputs, index_b, coefficients):
      own = {name: coefficients[name] for name in role_terms}
      sums = function(variables, inputs, index_b, own)
      # Both branches must return the same structure; what a role lacks is left out again below.
      nothing = role_gradient_lib.Sum(jnp.zeros_like(sums.count), jnp.zeros_like(sums.count))
      return sums._replace(values={name: sums.values.get(name, nothing) for name in names})

    return run

  if train or exchanges or terms.retain == terms.forget:
    # Training statistics and shared weights are collectives of a half, which stay out of conditionals.
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
    # Each half has its own examples under both names.
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
  """Maps the per-role function over the roles.

  Args:
    pairing: `sequential`, `vmap` or `pmap`.
    role_function: terms -> the function that `role_gradient.role_gradient` builds.
    terms: for each role the names of its terms, or None for a role the method does not use.
    train: whether batch statistics move, so that the halves of `pmap` must exchange them.
    sharpen: turns (params, coefficients) -> RoleMeans, a role's means over its whole batch, into one of
      the same signature whose gradient is sharpness-aware; the identity by default.
    exchanges: whether the devices of a half exchange something within the per-role function.

  Returns:
    (variables, Inputs, indices, coefficients) -> Paired of RoleMeans (None for an unused role). `indices`
    and `coefficients` are Paired; under `pmap` the indices are those of `own_indices`, and it must run inside
    `shard_map` over a mesh of `make_mesh`.
  """
  both = None not in terms
  if pairing == "pmap":
    if both:
      return _device_halves(role_function, terms, sharpen, train, exchanges)
    return _one_by_one(role_function, terms, sharpen, _sum_over_devices)
  if pairing == "vmap" and both:
    return _vmap(role_function, terms, sharpen)
  return _one_by_one(role_function, terms, sharpen)
