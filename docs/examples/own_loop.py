"""HAMU in a training loop of one's own: python docs/examples/own_loop.py"""

# --8<-- [start:loop]
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hamu_jax.transforms import BRANCHES, hamu

learning_rate = 0.1
optimizer = optax.chain(hamu(learning_rate, constraint=0.002), optax.sgd(learning_rate))


def loss(params, inputs_BxF, labels_B):
  logits_BxC = inputs_BxF @ params["kernel"] + params["bias"].reshape(1, -1)
  return optax.softmax_cross_entropy_with_integer_labels(logits_BxC, labels_B).mean()


@jax.jit
def step(params, state, retain, forget):
  retain_gradients = jax.grad(loss)(params, *retain)
  forget_gradients = jax.grad(loss)(params, *forget)
  updates, state = optimizer.update(retain_gradients, state, params, forget_grads=forget_gradients)
  return optax.apply_updates(params, updates), state


# --8<-- [end:loop]


def main(steps=5):
  """Prints both losses by step, and what HAMU did with each tensor."""
  rng = np.random.default_rng(0)
  retain, forget = (
    (jnp.asarray(rng.normal(size=(32, 8))), jnp.asarray(rng.integers(3, size=32))) for _ in range(2)
  )
  params = {"kernel": jnp.zeros((8, 3)), "bias": jnp.zeros(3)}
  state = optimizer.init(params)
  losses = [(float(loss(params, *retain)), float(loss(params, *forget)))]
  for _ in range(steps):
    params, state = step(params, state, retain, forget)
    losses.append((float(loss(params, *retain)), float(loss(params, *forget))))
    branches = [BRANCHES[code] for code in state[0].diagnostics.branch]
    print("retain {:.4f}, forget {:.4f}".format(*losses[-1]), *branches)
  return losses


if __name__ == "__main__":
  main()
