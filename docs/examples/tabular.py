"""A third modality: forget patients of a table, by implementing the protocols of a task.

  python -m hamu_jax.main --config=docs/examples/tabular.py --workdir=runs/tabular

The table is the breast cancer dataset that scikit-learn ships: 569 patients, 30 measurements, two diagnoses.
A random share of the patients asks to be forgotten; pretraining, retraining, unlearning by any method of the
table, evaluation and the run directory are those of every experiment.
"""

import copy
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from hamu_jax import models
from hamu_jax.config import default_config, modalities
from hamu_jax.config.default import build_model
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.engine.objectives import Outputs
from hamu_jax.engine.placement import place, place_batches
from hamu_jax.experiment import tasks
from hamu_jax.metrics import classification, membership
from hamu_jax.models import weights
from hamu_jax.paired import Paired
from hamu_jax.run import rundir

TEST_EVERY = 5


# --8<-- [start:request]
class TableRequest:
  """Which patients are learnt and which are forgotten: an `experiment.task.UnlearningRequest`."""

  estimates_scores = False
  validation = np.zeros(0, np.int32)

  def __init__(self, inputs, labels, *, fraction: float, seed: int):
    self.inputs, self.labels = inputs, labels
    self._fraction, self._seed = fraction, seed

  @property
  def fingerprint(self) -> str:
    return hashlib.sha256(self.inputs.tobytes() + self.labels.tobytes()).hexdigest()

  @property
  def available(self):
    return np.arange(len(self.labels), dtype=np.int32)

  original_indices = available

  def read_scores(self):
    return None

  def split(self, scores) -> Paired:
    del scores
    order = np.random.default_rng(self._seed).permutation(self.available)
    count = max(1, round(self._fraction * len(order)))
    return Paired(retain=np.sort(order[count:]), forget=np.sort(order[:count]))


# --8<-- [end:request]


# --8<-- [start:feed]
class TableFeed:
  """The whole table stays on the devices: an `engine.feed.Feed`."""

  sharded = False

  def __init__(self, data):
    self._data = data

  def prepare(self, plan, total_steps):
    """There is nothing to prepare."""

  def most_steps(self, plan):
    return chunk_lib.CHUNK_CAPACITY

  def chunk(self, plan, start, stop, mesh):
    indices = plan.indices(start, stop)
    if mesh is not None:
      indices = pairing_lib.shard_indices(indices, mesh)
    return place(self._data, mesh), place_batches(indices, plan.epochs(start, stop), mesh)


def fetch(data, indices, key):
  """The batch of some indices; -1 is padding."""
  del key
  present = indices.clip(0)
  batch = {name: leaf[present] for name, leaf in data.items()}
  return batch | {"mask": indices >= 0, "index": present}


# --8<-- [end:feed]


# --8<-- [start:evaluator]
class Rows:
  """Some rows of a table."""

  def __init__(self, inputs, labels, indices):
    self.inputs, self.labels, self.indices = inputs[indices], labels[indices], indices


class TableEvaluator:
  """Evaluates named splits: an `experiment.task.Evaluator`."""

  def __init__(self, forward, splits):
    self.splits = splits

    def evaluate(variables, batch):
      outputs, _ = forward(variables, batch, jax.random.key(0), False)
      return classification.per_example(outputs.logits, batch["label"])

    self._evaluate = jax.jit(evaluate)

  def per_example(self, variables):
    return {
      name: jax.device_get(self._evaluate(variables, {"input": rows.inputs, "label": rows.labels}))
      for name, rows in self.splits.items()
    }

  def summary(self, variables):
    values = self.per_example(variables)
    result = {name: classification.summarize(split) for name, split in values.items()}
    result["forget_test_auc"] = membership.loss_auc(values["forget"]["loss"], values["test"]["loss"])
    return result


# --8<-- [end:evaluator]


# --8<-- [start:task]
class Table:
  """An experiment on rows of a table: an `experiment.task.Task`."""

  def __init__(self, config):
    self._config = config
    inputs, labels = datasets.load_breast_cancer(return_X_y=True)
    inputs = ((inputs - inputs.mean(0)) / inputs.std(0)).astype(np.float32)
    self._is_test = np.arange(len(labels)) % TEST_EVERY == 0
    self._inputs, self._labels = inputs, labels.astype(np.int32)
    self.request = TableRequest(
      self._inputs[~self._is_test],
      self._labels[~self._is_test],
      fraction=config.data.forget_fraction,
      seed=config.data.seed,
    )
    self._model = build_model(config.model, num_classes=2)
    self.template = jax.eval_shape(self.init, config.seed)

  def init(self, seed):
    shape = (1, self._inputs.shape[1])
    return {
      "params": self._model.init(jax.random.key(seed), jnp.zeros(shape))["params"],
      "batch_stats": {},
    }

  def with_config(self, config):
    other = copy.copy(self)
    other._config = config
    return other

  inputs = evaluation_inputs = unlearning_inputs = provenance = property(lambda self: {})

  def forward(self, pairing):
    def forward(variables, batch, key, train):
      del key, train
      return Outputs(self._model.apply({"params": variables["params"]}, batch["input"])), {}

    return forward

  def fetch(self, augment):
    return fetch

  def feed(self, split):
    forget = np.isin(self.request.available, split.forget)
    return TableFeed({"input": self.request.inputs, "label": self.request.labels, "forget": forget})

  def base(self, mesh):
    return {}

  def in_training_mode(self, options):
    return False

  def microbatch(self, training_mode):
    return 0

  def evaluator(self, split, scores, mesh):
    request = self.request
    splits = {role: Rows(request.inputs, request.labels, getattr(split, role)) for role in split._fields}
    splits["test"] = Rows(self._inputs, self._labels, np.flatnonzero(self._is_test))
    return TableEvaluator(self.forward("sequential"), splits)

  def training_evaluator(self, mesh):
    raise NotImplementedError("forget sets of tables go by no memorization scores")

  def selection_score(self, summary):
    return (summary["retain"]["accuracy"] + summary["forget"]["accuracy"]) / 2

  def final_evaluations(self, evaluator):
    return {}

  def compare(self, results, examples):
    """Tug of war is all there is to compare."""

  def read_weights(self, path):
    return models.load_weights(path, self.template)

  def weights_fingerprint(self, path):
    return weights.fingerprint(path)

  def save(self, workdir, name, variables):
    rundir.write_bytes(workdir / f"{name}.safetensors", models.weights_bytes(variables))

  def work(self, feed, stage, steps):
    return {}


# --8<-- [end:task]


# --8<-- [start:register]
tasks.register("table", Table, modalities.Modality(reads=("data.seed", "data.forget_fraction")))
# --8<-- [end:register]


def get_config():
  """A tenth of the patients is to be forgotten."""
  config = default_config()
  config.modality = "table"
  config.model.name = "mlp"
  config.data.forget_fraction = 0.1
  config.train.update(epochs=30, batch_size=64, evaluate_epochs=0.0, select="last")
  config.train.optimizer.learning_rate = 1e-2
  config.method.update(name="gdiff", epochs=4.0, batch_size=32, evaluate_epochs=1.0)
  config.method.optimizer.update(name="adamw", learning_rate=5e-4)
  return config
