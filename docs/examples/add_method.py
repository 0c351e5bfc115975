"""A new method: forget by making the model's answers uniform.

  python -m hamu_jax.main --config=docs/examples/add_method.py --workdir=runs/uniform

The objective is `w CE(retain) + (1 - w) U(forget)`, with U the cross-entropy of the uniform
distribution and w `config.method.retain_weight`.
"""

import jax
import jax.numpy as jnp

from hamu_jax.config import default_config
from hamu_jax.config.digits import on_digits
from hamu_jax.engine import methods, objectives


# --8<-- [start:term]
def uniform_cross_entropy(outputs, context):
  """`-(1 / C) sum_k log p_k` of each prediction: [...] of logits [..., C]."""
  del context
  return -jnp.mean(jax.nn.log_softmax(outputs.logits), axis=-1)


objectives.TERMS["uniform"] = objectives.Term(uniform_cross_entropy)
# --8<-- [end:term]


# --8<-- [start:row]
def forget_weight(hyperparameters, epoch):
  """The part of the objective that the retain set does not have."""
  del epoch
  return 1 - hyperparameters["retain_weight"]


methods.METHODS["uniform"] = methods.Method(
  (
    methods.SubStep(
      retain={"ce": "retain_weight"},
      forget={"uniform": methods.Schedule(forget_weight, reads=("retain_weight",))},
      # Coefficients are in the gradients already.
      transform=methods.ADD,
    ),
  )
)
# --8<-- [end:row]


def get_config():
  """The digit 0 is to be forgotten."""
  config = default_config()
  config.method.update(name="uniform", epochs=4.0)
  config.method.optimizer.learning_rate = 0.1
  on_digits(config, "mlp")
  config.data.update(forget="class", forget_class=(0,))
  return config
