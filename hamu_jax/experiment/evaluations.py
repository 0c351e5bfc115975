"""The evaluation of a stage's model, which is computed or taken from the cache."""

from typing import Any

from hamu_jax.engine import placement
from hamu_jax.experiment.preparation import Preparation
from hamu_jax.experiment.task import Evaluator
from hamu_jax.run import hosts, preemption, progress
from hamu_jax.run.rundir import jsonable
from hamu_jax.run.stage_cache import StageCache, fingerprint

Tree = Any
Record = dict[str, Any]


class Evaluations:
  """Evaluates the models of an experiment.

  Attributes:
    evaluator: evaluator of the task.

  Args:
    prepared: data, model and plan.
    evaluator: see the attribute.
    cache: cache of finished stages.
    watch: watcher of signals.
  """

  def __init__(self, prepared: Preparation, evaluator: Evaluator, cache: StageCache, watch: preemption.Watch):
    self.evaluator = evaluator
    self._prepared, self._cache, self._watch = prepared, cache, watch

  def key(self, name: str) -> str:
    """The key of the evaluation of a stage's model."""
    options = self._prepared.config.evaluate
    return fingerprint(
      {
        "of": self._prepared.plan.keys[name],
        **self._prepared.task.evaluation_inputs,
        "options": {option: options[option] for option in ("batch_size", "batch_tokens", "min_k_fraction")},
        "splits": {split: examples.indices.tolist() for split, examples in self.evaluator.splits.items()},
      }
    )

  def evaluate(self, name: str, variables: Tree, *, title: str) -> tuple[Record, Record]:
    """Evaluates the final model of a stage.

    Args:
      name: name of the stage.
      variables: variables of the model.
      title: what the display calls the model.

    Returns:
      The values of all splits and, by kind of evaluation, the values of single examples.
    """
    key = self.key(name)
    placed = placement.place(variables, self._prepared.evaluation_mesh)

    def cached(kind, key, compute):
      record = self._cache.outcome(kind, key)
      if hosts.agree(record is None):
        part = "" if kind == "evaluate" else f", {kind}"
        position = f"{1 + kinds.index(kind)}/{len(kinds)}"
        with progress.Progress(f"evaluating {title} {position}{part}", enabled=hosts.is_writer()):
          record = self._watch.run(lambda: compute(placed))
        self._cache.publish(kind, key, record)
      return record

    finals = self._prepared.task.final_evaluations(self.evaluator)
    kinds = ["evaluate", *finals]
    results, examples = cached("evaluate", key, self.evaluator.summary), {}
    for kind, (depends_on, compute) in finals.items():
      record = cached(
        kind,
        fingerprint({"of": key, **depends_on}),
        lambda placed, compute=compute: jsonable(
          dict(zip(("values", "examples"), compute(placed), strict=True))
        ),
      )
      if record["values"]:
        results[kind] = record["values"]
      if record["examples"]:
        examples[kind] = record["examples"]
    return results, examples
