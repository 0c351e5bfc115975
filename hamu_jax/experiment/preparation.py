"""The preparation of an experiment: data, model, devices, split and the plan of its stages."""

import os
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from hamu_jax.config import readers
from hamu_jax.engine import methods
from hamu_jax.engine import pairing as pairing_lib
from hamu_jax.errors import UserError
from hamu_jax.experiment import given, masks, memorization, stage_plan, tasks
from hamu_jax.experiment.task import Task
from hamu_jax.run import compilation

Tree = Any


class Preparation:
  """Data, model and plan of an experiment, checked before the run directory is touched.

  Attributes:
    config: validated configuration.
    method: row of the method table.
    task: data and model.
    devices: devices that work on a step.
    scores: [n] memorization scores if the forget set depends on them, else None.
    split: Paired int32 indices of the retain and forget examples.
    plan: plan of the stages.
    template: shapes of the model's variables.
    init: (seed) -> untrained variables, jitted.
    imported: trained variables to unlearn from, None without them.
    retrained: variables of the reference model if it is given, else None.
    given_mask: mask of `config.mask.path`, None without one.

  Args:
    config: see the attribute.
    like: preparation of an experiment that differs only in hyperparameters and seeds; data, model and
      programs are shared with it.

  Raises:
    UserError: the experiment cannot run.
  """

  def __init__(self, config: ml_collections.ConfigDict, like: "Preparation | None" = None):
    compilation.use(config.compilation_cache)
    self.config = config
    self.method = methods.METHODS[config.method.name]
    self.devices = self._choose_devices()
    self.task: Task = tasks.make_task(config) if like is None else like.task.with_config(config)
    request = self.task.request
    if request.estimates_scores:
      self._check_ensemble()
    self.template = self.task.template
    self.init: Callable[[int], Tree] = jax.jit(self.task.init) if like is None else like.init
    self._check_memory()
    scores = request.read_scores()
    request.split(scores)  # Its errors come before the weights are read.
    if like is None:
      weights, reference = config.model.weights, readers.given_reference(config)
      self.imported = given.read(self.task, "config.model.weights", weights, "original") if weights else None
      self.retrained = (
        given.read(self.task, "config.retrained", reference, "retrained") if reference else None
      )
    else:
      self.imported, self.retrained = like.imported, like.retrained
    self.choose_split(scores)
    params = self.template["params"]
    masks.check_fractions(config.mask, params)
    self.given_mask = masks.read_mask(config.mask.path, params) if config.mask.path else None

  def _check_memory(self) -> None:
    """Raises a UserError if the host cannot hold even one copy of the model."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.template))
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > available:
      raise UserError(
        f"config.model.name={self.config.model.name!r}: with these options the model takes "
        f"{size / 2**30:.3g} GiB, and this machine has {available / 2**30:.3g} GiB; lower config.model.width "
        "or config.model.depth"
      )

  def choose_split(self, scores: np.ndarray | None) -> None:
    """Splits the examples, by the scores if the forget set depends on them, and plans the stages."""
    self.scores = scores
    self.split = self.task.request.split(scores)
    self.plan = stage_plan.make_plan(self.config, self.task, self.split, devices=len(self.devices))

  @property
  def makes_mask(self) -> bool:
    """Whether there is a mask stage."""
    return self.method.unlearns and self.given_mask is None and bool(self.config.mask.fraction)

  @property
  def evaluation_mesh(self) -> jax.sharding.Mesh | None:
    """The devices that share an evaluation; None for the default device."""
    if self.config.pairing != "pmap":
      return None
    return pairing_lib.make_mesh(self.devices, 1, self.config.mesh.weights)

  def _check_ensemble(self) -> None:
    """Raises a UserError unless an ensemble can be trained here and would give scores."""
    if jax.process_count() > 1:
      raise UserError(
        f"config.data.scores={readers.ESTIMATE!r}: an ensemble is trained by one process; estimate the "
        "scores in a run of its own and give its memorization.npz"
      )
    available = len(self.task.request.available)
    memorization.subsets(self.config.memorization, available, self.config.seed)

  def _choose_devices(self) -> tuple[jax.Device, ...]:
    """The devices of `config.devices` for `pmap`, one device for the other pairings."""
    devices, config = jax.devices(), self.config
    several = jax.process_count() > 1
    if several and (config.pairing != "pmap" or config.devices not in (0, len(devices))):
      raise UserError(
        f"config.pairing={config.pairing!r}, config.devices={config.devices}: several processes work "
        "together only with pairing 'pmap' on all their devices; set devices to 0"
      )
    chosen = pairing_lib.choose_devices(devices, config.pairing, config.devices)
    if config.pairing == "pmap":
      # Raises an error before anything is loaded.
      pairing_lib.make_mesh(chosen, self.method.device_groups, config.mesh.weights)
    return chosen
