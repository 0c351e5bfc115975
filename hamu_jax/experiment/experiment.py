"""One experiment: runs every stage, from the data to the evaluated models, or takes it from the cache."""

import pathlib
import sys
from typing import Any, NamedTuple

import ml_collections
from clu import parameter_overview

from hamu_jax.config import default as config_lib
from hamu_jax.engine import loop as loop_lib
from hamu_jax.engine import stage as stage_lib
from hamu_jax.engine import sub_step
from hamu_jax.experiment import header, results
from hamu_jax.experiment.preparation import Preparation
from hamu_jax.experiment.stages import Stages
from hamu_jax.run import disk, hosts, preemption, progress
from hamu_jax.run import rundir as rundir_lib

Tree = Any


class Start(NamedTuple):
  """The inputs of the unlearning stage.

  Attributes:
    stage: unlearning stage.
    loop: loop that runs it.
    original: variables of the model to unlearn from.
    frozen: reference model and mask that the steps read.
  """

  stage: stage_lib.Stage
  loop: loop_lib.Loop
  original: Tree
  frozen: sub_step.Frozen


class Experiment:
  """Data, model and cache of one configuration; `run` does the work.

  The stages are memorization scores (if the forget set needs an estimate), pretraining, retraining, saliency
  masks (if there is a mask), unlearning and evaluation.

  Attributes:
    prepared: data, model and plan.
    stages: stages of the experiment.

  Args:
    config: validated configuration.
    workdir: run directory.
    watch: watcher of signals.
    record: whether it takes possession of the run directory and logs there. The stage cache is used in either
      case.
    like: experiment that differs from this one only in hyperparameters and seeds, see `together.group_key`;
      data, model and programs are shared with it.

  Raises:
    UserError: something in the configuration or the data is wrong.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    watch: preemption.Watch,
    *,
    record: bool = True,
    like: "Experiment | None" = None,
  ):
    self._workdir = workdir
    # What is shared is there already.
    loading = progress.before_run("loading data and model", enabled=hosts.is_writer() and like is None)
    with watch.nothing_to_save(), loading:
      self.prepared: Preparation = Preparation(config, None if like is None else like.prepared)
    # Opened after the preparation, so that an experiment that cannot run leaves the workdir alone.
    self._rundir = (
      _open(config, workdir, writer=hosts.is_writer()) if record else rundir_lib.RunDir(workdir, writer=False)
    )
    shared = None if like is None else like.stages
    self.stages: Stages = Stages(self.prepared, workdir, watch, self._rundir, shared)

  def run(self) -> dict[str, Any]:
    """Runs all stages, writes the summary, the plots and the models, prints the table.

    Returns:
      The content of summary.json.

    Raises:
      UserError: something in the configuration or the data is wrong.
      preemption.Preempted: the run was asked to end; finished work is saved.
    """
    overview = parameter_overview.get_parameter_overview(
      self.prepared.template["params"], include_stats=False
    )
    if hosts.is_writer():
      rundir_lib.write_bytes(self._workdir / "parameters.txt", f"{overview}\n".encode())
    try:
      return self._run()
    finally:
      self.close()

  def _run(self) -> dict[str, Any]:
    """Does the work of `run` with an open run directory."""
    stages, method = self.stages, self.prepared.method
    # Preparing checks the examples, too; an error comes before the header.
    records = dict(stages.prepare())
    text = header.header(stages)
    if hosts.is_writer():
      print(text, file=sys.stderr, flush=True)
    original, records["pretrain"] = stages.original()
    models, mask = {"original": original}, None
    if self.prepared.config.retrain or method.from_scratch:
      models["retrained"], records["retrain"] = stages.retrained()
    if method.from_scratch:
      models["unlearned"] = models["retrained"]
    elif method.unlearns:
      mask, mask_record = stages.mask(original)
      records |= {"mask": mask_record} if mask_record else {}
      models["unlearned"], records["unlearn"] = stages.unlearned(original, mask)
    values, examples = results.evaluate_models(stages, models)
    summary = results.summarize(stages, values, records)
    if hosts.is_writer():
      with disk.writing(self._workdir):
        results.leave(self._workdir, stages, summary, models, mask, examples)
    return summary

  def start(self) -> Start:
    """Runs the stages before unlearning, or takes them from the cache.

    The method must unlearn.

    Raises:
      UserError: see `run`.
      preemption.Preempted: see `run`.
    """
    self.stages.prepare()
    original, _ = self.stages.original()
    mask, _ = self.stages.mask(original)
    stage = self.prepared.plan.stages["unlearn"]
    return Start(stage, self.stages.loop, original, self.stages.frozen(original, mask))

  def make_mask(self) -> dict[str, Any]:
    """Runs the stages up to the mask, which must be one of them, and leaves it in the run directory.

    Returns:
      The record of the mask stage.

    Raises:
      UserError: see `run`.
      preemption.Preempted: see `run`.
    """
    try:
      self.stages.prepare()
      original, _ = self.stages.original()
      mask, record = self.stages.mask(original)
      assert record is not None  # There is a mask stage.
      if hosts.is_writer():
        with disk.writing(self._workdir):
          self.prepared.task.save(self._workdir, "mask", {"params": mask})
      return record
    finally:
      self.close()

  def close(self) -> None:
    """Closes the run directory."""
    self._rundir.close()


def dry_run(config: ml_collections.ConfigDict, workdir: pathlib.Path, watch: preemption.Watch) -> str:
  """Prepares an experiment as a run does, and neither trains nor writes anything.

  Args:
    config: validated configuration.
    workdir: run directory, which may be missing.
    watch: watcher of signals.

  Returns:
    The header of the run. Where an ensemble is yet to choose the forget set, the stages that depend on the
    set count as lacking.

  Raises:
    UserError: the run would be refused.
  """
  stages = Experiment(config, workdir, watch, record=False).stages
  _open(config, workdir, writer=False)
  rundir_lib.refuse_foreign(workdir)
  if not stages.prepared.task.request.estimates_scores:
    with watch.nothing_to_save():
      stages.prepare()
  return header.header(stages)


def _open(config: ml_collections.ConfigDict, workdir: pathlib.Path, *, writer: bool) -> rundir_lib.RunDir:
  """Opens a run directory; without a writer it is only checked."""
  return rundir_lib.RunDir.open(
    workdir,
    config.to_dict(),
    defaults=config_lib.default_config().to_dict(),
    ignore=config_lib.incidental_fields(),
    writer=writer,
  )
