"""Where the two gradients of a step are computed.

One per-role function, `objectives.role_gradient`, is mapped in three ways:

- `sequential`: called once a role, one after the other;
- `vmap`: mapped over a leading axis of two on one device;
- `pmap`: the first half of the devices takes the retain batch and the second half the forget batch.
  Each half reduces its own sums, then the halves exchange once, so that every device holds both
  gradients. A method with one role uses all devices for it.

The `pmap` form is a `shard_map` over a mesh with axes ("role", "data") - what `jax.pmap` itself is
built on - because that also compiles ahead of time for a topology, and spans several hosts.
"""

from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax import lax

from hamu_jax import objectives
from hamu_jax.errors import UserError
from hamu_jax.paired import Paired

ROLE_AXIS = "role"
DATA_AXIS = "data"
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


def make_mesh(devices, roles: int) -> jax.sharding.Mesh:
  """Arranges devices as ("role", "data"): an equal share for each of 1 or 2 roles.

  Raises:
    UserError: the devices cannot be shared out evenly.
  """
  devices = np.asarray(devices)
  if devices.size % roles:
    raise UserError(
        f"config.devices: pairing 'pmap' needs an even number of devices, one half a role, but got "
        f"{devices.size}; set config.devices to an even number or config.pairing to 'sequential'"
    )
  return jax.sharding.Mesh(devices.reshape(roles, -1), (ROLE_AXIS, DATA_AXIS))


def shard_rows(rows: Paired, mesh: jax.sharding.Mesh) -> np.ndarray:
  """Splits batches among devices.

  Args:
    rows: for each role [n, B] int32 rows of n batches, or None.
    mesh: as made by `make_mesh`.

  Returns:
    [n, roles, devices a role, b] int32, b the largest share; shorter ones are padded with -1.
  """
  present = [batch_rows for batch_rows in rows if batch_rows is not None]
  shards = mesh.devices.shape[1]
  share = -(-max(batch_rows.shape[1] for batch_rows in present) // shards)

  def split(batch_rows):
    count, size = batch_rows.shape
    padded = np.full((count, shards * share), -1, np.int32)
    padded[:, :size] = batch_rows
    # Interleaved, so that the padding of a short batch is spread over the devices.
    return padded.reshape(count, share, shards).transpose(0, 2, 1)

  return np.stack([split(batch_rows) for batch_rows in present], axis=1)


def _means(sums: objectives.RoleSums) -> RoleMeans:
  """Divides by the count; an all-padding batch (which no plan makes) would give zeros."""
  count = jnp.maximum(sums.count, 1)
  gradient, values = jax.tree.map(lambda leaf: leaf / count, (sums.gradient, sums.values))
  return RoleMeans(gradient, values, sums.batch_stats)


def _sequential(role_function, terms: Paired):
  functions = [None if names is None else role_function(names) for names in terms]

  def gradients(variables, reference, data, rows, coefficients, key):
    return Paired(*(
        None
        if function is None
        else _means(function(variables, reference, data, role_rows, role_coefficients, key))
        for function, role_rows, role_coefficients in zip(
            functions, rows, coefficients, strict=True
        )
    ))

  return gradients


def _vmap(role_function, terms: Paired):
  union = tuple(sorted(set(terms.retain) | set(terms.forget)))
  mapped = jax.vmap(role_function(union), in_axes=(None, None, None, 0, 0, None))

  def gradients(variables, reference, data, rows, coefficients, key):
    rows_2xB = jnp.stack(rows)
    both = {
        name: jnp.stack([jnp.asarray(role.get(name, 0.0)) for role in coefficients])
        for name in union
    }
    means = jax.vmap(_means)(mapped(variables, reference, data, rows_2xB, both, key))
    return Paired(*(jax.tree.map(lambda leaf, i=i: leaf[i], means) for i in range(2)))

  return gradients


def _device_halves(role_function, terms: Paired):
  """The body that runs on each device, inside `shard_map` over (role, data)."""
  if terms.retain == terms.forget:
    shared = role_function(terms.retain)

    def own_sums(is_forget, variables, reference, data, rows_b, coefficients, key):
      chosen = jax.tree.map(
          lambda retain, forget: jnp.where(is_forget, forget, retain), *coefficients
      )
      return shared(variables, reference, data, rows_b, chosen, key)

  else:
    functions = Paired(*(role_function(names) for names in terms))
    names = sorted({"ce", "accuracy", *terms.retain, *terms.forget})

    def own_sums(is_forget, variables, reference, data, rows_b, coefficients, key):
      def branch(role):
        def run():
          sums = getattr(functions, role)(
              variables, reference, data, rows_b, getattr(coefficients, role), key
          )
          # Both branches must return the same structure; what a role lacks is left out again below.
          return sums._replace(
              values={
                  name: sums.values.get(name, jnp.zeros_like(sums.count)) for name in names
              }
          )

        return run

      return lax.cond(is_forget, branch("forget"), branch("retain"))

  def own_values(means, names):
    logged = {"ce", "accuracy", *names}
    return means._replace(values={name: means.values[name] for name in sorted(logged)})

  def gradients(variables, reference, data, rows, coefficients, key):
    is_forget = lax.axis_index(ROLE_AXIS) == 1
    own = own_sums(is_forget, variables, reference, data, rows, coefficients, key)
    # Batch statistics stay out of the exchange: unlearning freezes them. As one vector the rest takes
    # one collective for the sum and one for the exchange, whatever the number of tensors.
    vector, restore = jax.flatten_util.ravel_pytree(own._replace(batch_stats=()))
    vector = lax.psum(vector, DATA_AXIS)
    other = lax.ppermute(vector, ROLE_AXIS, [(0, 1), (1, 0)])
    both = jnp.where(is_forget, other, vector), jnp.where(is_forget, vector, other)
    return Paired(*(
        own_values(_means(restore(vector)._replace(batch_stats=variables["batch_stats"])), names)
        for vector, names in zip(both, terms, strict=True)
    ))

  return gradients


def _device_group(role_function, terms: Paired):
  """One role on all devices."""
  function = role_function(terms.retain if terms.retain is not None else terms.forget)

  def gradients(variables, reference, data, rows, coefficients, key):
    (own_coefficients,) = [role for role in coefficients if role is not None]
    sums = function(variables, reference, data, rows, own_coefficients, key)
    reduced = lax.psum(sums._replace(batch_stats=()), DATA_AXIS)
    means = _means(reduced._replace(batch_stats=sums.batch_stats))
    return Paired(means, None) if terms.retain is not None else Paired(None, means)

  return gradients


def make_gradients(pairing: str, role_function, terms: Paired):
  """Maps the per-role function over the roles.

  Args:
    pairing: `sequential`, `vmap` or `pmap`.
    role_function: terms -> the function that `objectives.role_gradient` builds.
    terms: for each role the names of its terms, or None for a role the method does not use.

  Returns:
    (variables, reference, data, rows, coefficients, key) -> Paired of RoleMeans (None for an unused
    role). `rows` and `coefficients` are Paired, except that under `pmap` `rows` is the device's own
    shard [b]; `pmap` must run inside `shard_map` over a mesh of `make_mesh`.
  """
  both = None not in terms
  if pairing == "pmap":
    return (_device_halves if both else _device_group)(role_function, terms)
  if pairing == "vmap" and both:
    return _vmap(role_function, terms)
  return _sequential(role_function, terms)


def own_shard(rows: jax.Array) -> jax.Array:
  """Inside `shard_map`: this device's rows [n, 1, 1, b] as [n, b]."""
  return rows[:, 0, 0]
