"""The one default configuration and its validation.

Every field is declared here, with its default, and read in one place. Files under `configs/` derive from
`default_config()` and override what differs; the command line overrides those.
"""

import difflib
import math
import pathlib
from typing import Any

import ml_collections
from ml_collections import config_dict

import sam_jax
from hamu_jax import data, models
from hamu_jax.config import language as language_fields
from hamu_jax.config.checks import choice, in_range
from hamu_jax.data import text
from hamu_jax.engine import methods, optimizers
from hamu_jax.engine import step as step_lib
from hamu_jax.errors import UserError
from hamu_jax.transforms.hamu import CRITERIA, SCOPES, SHARES
from hamu_jax.transforms.hamu_update import ON_INFEASIBLE
from sam_jax import memorization

PAIRINGS = ("sequential", "vmap", "pmap")
SELECTIONS = ("best", "last")
BATCH_NORMS = ("frozen", "batch")
# `model.name` of all language models; `language` says which.
LANGUAGE_MODEL = "llama"
# In `data.scores`: let this project estimate them.
ESTIMATE = "estimate"

# Fields that do not change what a run computes; a workdir may be resumed with others.
INCIDENTAL = ("stage_cache", "checkpoint_seconds", "wandb", "distributed", "memorization.parallel")


def is_incidental(name: str) -> bool:
  """Whether a field, by its dotted name without "config", changes no result."""
  return any(name == field or name.startswith(f"{field}.") for field in INCIDENTAL)


def _optional(kind: type) -> Any:
  return config_dict.placeholder(kind)


def optimizer_config(name: str, learning_rate: float) -> ml_collections.ConfigDict:
  """An optax optimizer under a schedule.

  Fields: `name`, any optax optimizer (sgd, adamw, lion, ...); `learning_rate`, its peak;
  `schedule`, constant | cosine | linear (both decay to 0) | step (times `decay_factor` at each of
  `decay_epochs`); `warmup_epochs`, linear from 0. `momentum`, `nesterov`, `b1`, `b2`, `eps` go to the
  optimizer when set; `weight_decay` is the optimizer's own if it has one, else added to the gradient.
  """
  return ml_collections.ConfigDict(
    {
      "name": name,
      "learning_rate": learning_rate,
      "schedule": "constant",
      "warmup_epochs": 0.0,
      "decay_epochs": (),
      "decay_factor": 0.1,
      "momentum": _optional(float),
      "nesterov": _optional(bool),
      "b1": _optional(float),
      "b2": _optional(float),
      "eps": _optional(float),
      "weight_decay": 0.0,
    }
  )


def _data_section() -> ml_collections.ConfigDict:
  """The dataset, and which of its rows are forgotten."""
  return ml_collections.ConfigDict(
    {
      "source": "huggingface",
      # Dataset name (tfds) or hub id (huggingface).
      "name": "uoft-cs/cifar10",
      # Local folder or archive (parquet, cifar10_binary); data directory or cache for tfds.
      "path": "",
      # "" takes the only column that fits.
      "image_key": "",
      "label_key": "",
      # 0 takes all; otherwise a class-balanced subset drawn with `seed`.
      "train_size": 0,
      "test_size": 0,
      "mean": (0.4914, 0.4822, 0.4465),
      "std": (0.2023, 0.1994, 0.2010),
      "seed": 41,
      # Name of the evaluation split at the source; "" is `test`.
      "test_split": "",
      # Configuration of a hub dataset, for those that have several.
      "subset": "",
      # Side to which images are resized and cropped; 0 takes them as they are, all of one size.
      "image_size": 0,
      # Decode images as they are needed instead of holding them in memory; needs `image_size`.
      "stream": False,
      # Share of each class's training rows that no stage learns from, drawn with `seed`.
      "validation_fraction": 0.0,
      # The forget set: class | hard_probability | random | indices | memorization.
      "forget": "class",
      "forget_class": (0,),
      "hard_probability": 0.0,
      "forget_fraction": 0.1,
      "forget_indices": "",
      # memorization: `forget_size` rows of a level (high | mid | low | mixed) by these scores: a published
      # file (.npz, .npy), or "estimate" to train an ensemble for them (config.memorization).
      "scores": "",
      "memorization_level": "high",
      "forget_size": 3000,
      # Exact copies of the forget set added to the retain set.
      "duplicates": 0,
    }
  )


def _train_section() -> ml_collections.ConfigDict:
  """Pretraining on all rows, and retraining of the reference on the retained ones."""
  return ml_collections.ConfigDict(
    {
      "epochs": 50,
      # Taken whole, because batch norm needs the statistics of all of it.
      "batch_size": 5000,
      "clip_norm": 0.0,
      "augment": "none",
      # each_epoch reshuffles; once keeps the first order, as the reference does.
      "shuffle": "each_epoch",
      # best: the evaluated epoch with the highest mean of retain and forget accuracy.
      "select": "best",
      "evaluate_epochs": 1.0,
      "optimizer": optimizer_config("adamw", 1e-3),
    }
  )


def _sam_section() -> ml_collections.ConfigDict:
  """Sharpness-aware gradients."""
  return ml_collections.ConfigDict(
    {
      # Radius of the perturbation in unlearning, and in pretraining and retraining; 0 is plain.
      "rho": 0.0,
      "train_rho": 0.0,
      # Whether each weight's radius is in proportion to its size.
      "adaptive": False,
      # Weight of the difference to the plain gradient.
      "lamb": 1.0,
      # Of unlearning: min seeks flat regions, max sharp ones.
      "mode": "min",
      # step: both roles at the point that their joint gradient leads to. role: each at its own. auto: step
      # for methods that descend one loss, role for hamu, gru and pcgrad.
      "scope": "auto",
    }
  )


def _mask_section() -> ml_collections.ConfigDict:
  """Weights that the forget set moves most: only they unlearn (any method), or they unlearn and all others
  retain (sharp_minmax).
  """
  return ml_collections.ConfigDict(
    {
      # Share of the weights; 0 uses no mask.
      "fraction": 0.0,
      # The shares for which the mask stage makes one.
      "fractions": (0.1, 0.3, 0.5),
      "batch_size": 256,
      # smallest is what the sharpness paper's code selects.
      "select": "largest",
      # update: weights outside stay exactly where they are. gradient: weight decay still moves them.
      # perturbed: as the paper's code, the plain gradient of sharpness-aware ones moves them, too.
      "scope": "update",
      # A mask file (safetensors) instead of the mask stage.
      "path": "",
    }
  )


def _memorization_section() -> ml_collections.ConfigDict:
  """The ensemble behind `data.scores = "estimate"`."""
  return ml_collections.ConfigDict(
    {
      "models": 64,
      # Share of the training rows that each model sees.
      "fraction": 0.7,
      # Models trained at once in one program.
      "parallel": 8,
      "epochs": 10.0,
      "batch_size": 128,
      "clip_norm": 0.0,
      "augment": "none",
      "evaluate_epochs": 0.0,
      "optimizer": optimizer_config("adamw", 1e-3),
    }
  )


def _method_section() -> ml_collections.ConfigDict:
  """The unlearning method and its run."""
  return ml_collections.ConfigDict(
    {
      "name": "hamu-q",
      "epochs": 25.0,
      # Ends the run after so many applied steps; 0: after `epochs`.
      "max_steps": 0,
      # once shuffles the sets once, and forget cycles on across epochs; each_epoch starts anew.
      "shuffle": "once",
      # matched: ft and ga see as many batches an epoch as a paired method; pass: each one its set once.
      "epoch": "matched",
      # frozen keeps batch norm in evaluation mode; batch trains on the statistics of each role's batch.
      "batch_norm": "frozen",
      # Copies of the data joined into one epoch, which then has fewer short batches.
      "repeats": 1,
      # Of the order of batches and all else that unlearning draws; not set: `config.seed`.
      "seed": _optional(int),
      "batch_size": 5000,
      # Gradients are accumulated over pieces of so many examples a device; 0 takes what suits it.
      "microbatch": 0,
      "augment": "none",
      # Largest norm of each role's gradient; 0 does not clip.
      "clip_norm": 1.0,
      "optimizer": optimizer_config("sgd", 1e-4),
      "evaluate_epochs": 1.0,
      # hamu: the guaranteed first-order change, absolute (`constraint`) or, where that is not set, as a
      # multiple of the current learning rate (`constraint_ratio`).
      "constraint": _optional(float),
      "constraint_ratio": 0.5,
      # hamu: a fixed step radius; not set: the learning-rate radius, lr * |retain gradient|.
      "radius": _optional(float),
      "share": "grad_norm",
      "normalize_share": True,
      "scope": "tensor",
      "on_infeasible": "stop",
      "stop_on_criterion": False,
      "criterion": "published",
      # Every method: stop once the batch loss of a role has crossed its threshold.
      "stop_on_loss": False,
      "max_retain_loss": 0.4,
      "min_forget_loss": 0.1,
      # gru, pcgrad.
      "max_norm": _optional(float),
      "reference_sign": False,
      # scrub: alpha KL + gamma CE on retain. scrub_distill: gamma CE + beta KL at this temperature on
      # retain, after ascending KL on forget in the first `msteps` epochs.
      "alpha": 0.001,
      "gamma": 0.99,
      "beta": 0.1,
      "temperature": 4.0,
      "msteps": 4,
      # neggrad, sharp_minmax: weight of the retain loss; that of the forget loss is 1 less.
      "retain_weight": 0.99,
      # sharp_minmax: modes in which the two halves are sharpness-aware.
      "retain_mode": "min",
      "forget_mode": "max",
      # ft_l1: weight of the L1 norm in the first epoch; it falls linearly and is 0 in the last
      # `l1_free_epochs`.
      "l1_weight": 5e-4,
      "l1_free_epochs": 0.0,
      # Language models: npo, simnpo, dpo, idk, undial, wga (each also as NAME_kl) and rmu descend
      # forget_coefficient times their own term plus retain_coefficient times the retain loss (NAME_kl: the
      # KL to the original, rmu: the distance to its states).
      "retain_coefficient": 1.0,
      "forget_coefficient": 1.0,
      # Their b; not set: npo and dpo 0.1, simnpo 4.5, undial 10, wga 1.
      "preference_beta": _optional(float),
      # simnpo: how far the loss must rise.
      "margin": 0.0,
      # rmu: the layer whose states are steered, and how far.
      "layer": 7,
      "steering": 2.0,
    }
  )


def default_config() -> ml_collections.ConfigDict:
  """The paper's CIFAR-10 experiment (arXiv 2606.02119): ResNet-20, forget class 0, hamu-q."""
  config = ml_collections.ConfigDict()
  # Of training, and of what has no seed of its own: `data.seed` draws rows, `method.seed` and
  # `evaluate.seed` are of unlearning and evaluation where they are set.
  config.seed = 41
  config.pairing = "sequential"
  # Devices used by `pmap`; 0 takes all.
  config.devices = 0
  # Where finished stages are kept and looked up; "" is `stages/` inside the workdir.
  config.stage_cache = ""
  config.checkpoint_seconds = 60.0

  # Devices of `pmap` that share one copy of a language model's frozen weights.
  config.mesh = ml_collections.ConfigDict({"weights": 1})

  config.data = _data_section()
  config.text = language_fields.text_section()
  config.language = language_fields.language_section()
  config.model = ml_collections.ConfigDict(
    {
      "name": "resnet20",
      # Options of those architectures that have them; not set takes the architecture's own.
      "width": _optional(int),
      "depth": _optional(int),
      "heads": _optional(int),
      "stages": _optional(tuple),
      # Trained weights to unlearn from (safetensors file or folder); "" pretrains.
      "weights": "",
    }
  )

  config.train = _train_section()
  config.sam = _sam_section()
  config.mask = _mask_section()
  config.memorization = _memorization_section()
  # Whether to train the reference model without the forget set (tug-of-war needs it).
  config.retrain = True

  config.method = _method_section()

  config.evaluate = ml_collections.ConfigDict(
    {
      # Of the rows that attacks learn from; not set: `config.seed`.
      "seed": _optional(int),
      "batch_size": 1000,
      # Whether to attack the final models with a support vector machine (membership inference).
      "membership": False,
      # Most retain and test rows, each, that the attack learns from: its cost grows with their square.
      "membership_size": 10_000,
      # Language models: most examples of a split (0: all), and tokens of a device program.
      "max_examples": 0,
      "batch_tokens": 8192,
      # Whether to generate answers for TOFU's scores, and how many tokens at most.
      "generate": True,
      "new_tokens": 200,
      # Share of an answer's tokens that Min-K% averages.
      "min_k_fraction": 0.1,
      # Of TOFU's scores: geometric | arithmetic | open_unlearning, see `metrics.tofu`.
      "tofu_variant": "geometric",
      # WaterDrum: folder or hub id of the tokenizer of the texts' watermarks, and their key; "" leaves the
      # watermark out.
      "watermark_tokenizer": "",
      "watermark_key": 1,
    }
  )

  config.wandb = ml_collections.ConfigDict(
    {
      # "" does not log there.
      "project": "",
      "name": "",
      "entity": "",
      "mode": "online",
    }
  )

  # Several hosts: the address of process 0 ("" for one host), or "auto" on a TPU pod or SLURM.
  config.distributed = ml_collections.ConfigDict(
    {
      "coordinator": "",
      "num_processes": 1,
      "process_id": 0,
    }
  )
  return config


def build_model(config: ml_collections.ConfigDict, *, num_classes: int, platform: str | None = None):
  """The model of `config.model`; arguments as of `models.build_model`."""
  options = {name: config[name] for name in ("width", "depth", "heads", "stages") if config[name] is not None}
  return models.build_model(config.name, num_classes=num_classes, platform=platform, **options)


def seed_of(config: ml_collections.ConfigDict, section: str) -> int:
  """The seed of the section `method` or `evaluate`: its own, else the experiment's."""
  own = config[section].seed
  return config.seed if own is None else own


def load_dataset(config: ml_collections.ConfigDict) -> data.Dataset:
  """The dataset that `config.data` names."""
  return data.load(
    config.source,
    name=config.name,
    path=config.path,
    subset=config.subset,
    test_split=config.test_split,
    train_size=config.train_size,
    test_size=config.test_size,
    image_key=config.image_key,
    label_key=config.label_key,
    image_size=config.image_size,
    stream=config.stream,
    seed=config.seed,
  )


def field_names(config: ml_collections.ConfigDict, prefix: str = "config") -> list[str]:
  """Dotted names of all fields that hold a value."""
  names = []
  for key, value in config.items():
    name = f"{prefix}.{key}"
    names += field_names(value, name) if isinstance(value, ml_collections.ConfigDict) else [name]
  return names


def unknown_field(name: str) -> UserError:
  """The error for a field that the default configuration does not declare."""
  known = field_names(default_config())
  nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
  return UserError(f"{name}: no such field; the nearest is {nearest}")


def _validate_optimizer(name: str, config: ml_collections.ConfigDict) -> None:
  in_range(f"{name}.learning_rate", config.learning_rate, 0)
  choice(f"{name}.schedule", config.schedule, optimizers.SCHEDULES)
  in_range(f"{name}.warmup_epochs", config.warmup_epochs, 0)
  in_range(f"{name}.decay_factor", config.decay_factor, 0)
  in_range(f"{name}.weight_decay", config.weight_decay, 0)
  for epoch in config.decay_epochs:
    in_range(f"{name}.decay_epochs", epoch, config.warmup_epochs, open_low=True)
  try:
    optimizers.make_optimizer(config, config.learning_rate)
  except UserError as error:
    raise UserError(f"{name.removesuffix('optimizer')}{error}") from error


def _validate_run_section(name: str, config: ml_collections.ConfigDict) -> None:
  """What `train` and `method` have in common."""
  in_range(f"{name}.epochs", config.epochs, 0, open_low=True)
  in_range(f"{name}.batch_size", config.batch_size, 1)
  in_range(f"{name}.clip_norm", config.clip_norm, 0)
  in_range(f"{name}.evaluate_epochs", config.evaluate_epochs, 0)
  choice(f"{name}.augment", config.augment, data.AUGMENTATIONS)
  _validate_optimizer(f"{name}.optimizer", config.optimizer)


def _validate_method(config: ml_collections.ConfigDict) -> None:
  _validate_run_section("config.method", config)
  in_range("config.method.microbatch", config.microbatch, 0)
  in_range("config.method.repeats", config.repeats, 1)
  in_range("config.method.max_steps", config.max_steps, 0)
  for name in (
    "constraint",
    "constraint_ratio",
    "radius",
    "alpha",
    "beta",
    "gamma",
    "msteps",
    "l1_weight",
    "l1_free_epochs",
    "retain_coefficient",
    "forget_coefficient",
    "layer",
    "steering",
  ):
    in_range(f"config.method.{name}", config[name], 0)
  in_range("config.method.retain_weight", config.retain_weight, 0, 1)
  in_range("config.method.preference_beta", config.preference_beta, 0, open_low=True)
  in_range("config.method.margin", config.margin, -math.inf)
  in_range("config.method.temperature", config.temperature, 0, open_low=True)
  choice("config.method.shuffle", config.shuffle, data.SHUFFLES)
  choice("config.method.epoch", config.epoch, data.EPOCHS)
  choice("config.method.batch_norm", config.batch_norm, BATCH_NORMS)
  for name in ("retain_mode", "forget_mode"):
    choice(f"config.method.{name}", config[name], sam_jax.MODES)
  if config.batch_norm == "batch" and config.microbatch:
    raise UserError(
      f"config.method.microbatch={config.microbatch}: batch norm needs the statistics of the whole "
      "batch; set it to 0 or config.method.batch_norm to 'frozen'"
    )
  in_range("config.method.max_norm", config.max_norm, 0, open_low=True)
  choice("config.method.share", config.share, SHARES)
  choice("config.method.scope", config.scope, SCOPES)
  choice("config.method.on_infeasible", config.on_infeasible, ON_INFEASIBLE)
  choice("config.method.criterion", config.criterion, CRITERIA)
  if config.name.startswith("hamu"):
    _validate_constraint(config)


def _validate_constraint(config: ml_collections.ConfigDict) -> None:
  """Refuses a constraint that no gradients could meet (unnormalised shares have no such bound).

  With gradients clipped to norm M a step of the learning-rate radius changes a loss by at most
  sum_t lr |g_r,t| |g_f,t| <= lr M^2 (Cauchy-Schwarz), and one of fixed radius R over the whole model by
  at most R M.
  """
  if config.constraint and config.radius is None and config.optimizer.warmup_epochs:
    raise UserError(
      f"config.method.constraint={config.constraint!r}: with warm-up the rate, and with it the radius, "
      "starts at 0, where no constraint can be met; use config.method.constraint_ratio or set "
      "config.method.radius"
    )
  if not config.clip_norm or config.on_infeasible != "stop":
    return
  if not config.normalize_share and config.share != "equal":
    return
  rate, clip = config.optimizer.learning_rate, config.clip_norm
  absolute = config.constraint is not None
  asked = config.constraint if absolute else config.constraint_ratio * rate
  field = "constraint" if absolute else "constraint_ratio"
  if config.radius is None:
    most = rate * clip * clip
    why = f"the learning-rate radius with gradients clipped to {clip:g}"
  elif config.scope == "global":
    most = config.radius * clip
    why = f"radius {config.radius:g} with gradients clipped to {clip:g}"
  else:
    return
  if asked > most * (1 + 1e-6):
    unit = 1.0 if absolute else max(rate, 1e-30)
    raise UserError(
      f"config.method.{field}={config[field]!r}: {why} can change the loss by at most "
      f"{most / unit:.6g} {'' if absolute else 'times the learning rate '}a step, so no step would be "
      f"feasible; lower it to at most {most / unit:.6g}"
    )


def _validate_data(config: ml_collections.ConfigDict) -> None:
  choice("config.data.source", config.source, data.SOURCES)
  choice("config.data.forget", config.forget, data.FORGET_KINDS)
  for name in ("train_size", "test_size", "duplicates", "image_size"):
    in_range(f"config.data.{name}", config[name], 0)
  in_range("config.data.forget_size", config.forget_size, 1)
  in_range("config.data.validation_fraction", config.validation_fraction, 0, 0.9)
  choice("config.data.memorization_level", config.memorization_level, memorization.LEVELS)
  if config.stream and not config.image_size:
    raise UserError("config.data.stream=True: streamed images need one size; set config.data.image_size")
  scores = config.scores
  if config.forget == "memorization" and not scores:
    raise UserError(
      "config.data.scores='': forget sets by memorization need a score file, or "
      f"{ESTIMATE!r} to let an ensemble estimate the scores"
    )
  if config.forget == "memorization" and scores != ESTIMATE and not pathlib.Path(scores).is_file():
    raise UserError(
      f"config.data.scores={scores!r}: no such file; give a .npz or .npy of scores, or "
      f"{ESTIMATE!r} to let an ensemble estimate them"
    )
  in_range("config.data.hard_probability", config.hard_probability, 0, 1)
  in_range("config.data.forget_fraction", config.forget_fraction, 0, 1, open_low=True)
  if len(config.mean) != len(config.std):
    raise UserError(
      f"config.data.std={tuple(config.std)!r}: needs one value a channel, as config.data.mean has"
    )
  for value in config.std:
    in_range("config.data.std", value, 0, open_low=True)


def _validate_sam(config: ml_collections.ConfigDict, method: ml_collections.ConfigDict) -> None:
  for name in ("rho", "train_rho"):
    in_range(f"config.sam.{name}", config[name], 0)
  in_range("config.sam.lamb", config.lamb, -math.inf)
  choice("config.sam.mode", config.mode, sam_jax.MODES)
  choice("config.sam.scope", config.scope, step_lib.SCOPES)
  if config.scope == "step" and not all(s.one_loss for s in methods.METHODS[method.name].substeps):
    raise UserError(
      f"config.sam.scope='step': {method.name} has no joint loss whose gradient could perturb both "
      "roles; set it to 'role'"
    )


def _validate_mask(config: ml_collections.ConfigDict, method: ml_collections.ConfigDict) -> None:
  choice("config.mask.select", config.select, sam_jax.SELECTIONS)
  choice("config.mask.scope", config.scope, step_lib.MASK_SCOPES)
  in_range("config.mask.batch_size", config.batch_size, 1)
  for fraction in config.fractions:
    in_range("config.mask.fractions", fraction, 0, 1, open_low=True)
  in_range("config.mask.fraction", config.fraction, 0, 1)
  if config.path and not pathlib.Path(config.path).is_file():
    raise UserError(
      f"config.mask.path={config.path!r}: no such file; give a mask.safetensors of another run, or leave "
      "it empty to compute the mask"
    )
  if config.fraction and not config.path and config.fraction not in config.fractions:
    raise UserError(
      f"config.mask.fraction={config.fraction!r}: choose from config.mask.fractions="
      f"{tuple(config.fractions)!r}, or add it there"
    )
  if methods.METHODS[method.name].needs_mask and not (config.fraction or config.path):
    raise UserError(
      f"config.mask.fraction=0: {method.name} needs a mask; choose from config.mask.fractions="
      f"{tuple(config.fractions)!r}, or give a file as config.mask.path"
    )


def _validate_combinations(config: ml_collections.ConfigDict) -> None:
  """Refuses settings of several sections that together have no meaning."""
  method, options = methods.METHODS[config.method.name], config.method
  if method.layout == "merged" and config.data.duplicates:
    raise UserError(
      f"config.data.duplicates={config.data.duplicates}: {options.name} labels an example by its row, so "
      "copies in the retain set would be relabelled, too; set it to 0"
    )
  if options.repeats > 1 and (method.layout == "passes" or options.name == "ft_l1"):
    raise UserError(
      f"config.method.repeats={options.repeats}: {options.name} counts single epochs; set it to 1"
    )


def _validate_memorization(config: ml_collections.ConfigDict) -> None:
  _validate_run_section("config.memorization", config)
  in_range("config.memorization.models", config.models, 2)
  in_range("config.memorization.parallel", config.parallel, 1)
  in_range("config.memorization.fraction", config.fraction, 0, 0.999, open_low=True)


def _validate_images(config: ml_collections.ConfigDict) -> None:
  """What only image models have."""
  try:
    build_model(config.model, num_classes=2, platform="cpu")
  except UserError as error:
    raise UserError(f"config.model: {error}") from error
  if config.data.source in text.TEXT_SOURCES:
    raise UserError(
      f"config.data.source={config.data.source!r}: these are texts; set config.model.name to "
      f"{LANGUAGE_MODEL!r}, or choose from {', '.join(data.SOURCES)}"
    )
  _validate_data(config.data)
  if methods.METHODS[config.method.name].for_language:
    raise UserError(
      f"config.method.name={config.method.name!r}: is defined for language models only; choose from "
      + ", ".join(name for name, method in methods.METHODS.items() if not method.for_language)
    )
  if config.mesh.weights != 1:
    raise UserError(
      f"config.mesh.weights={config.mesh.weights}: an image model has no frozen weights to share; set it to 1"
    )


def is_language(config: ml_collections.ConfigDict) -> bool:
  """Whether the experiment is on a language model."""
  return config.model.name == LANGUAGE_MODEL


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks everything that can be checked before data is loaded or a device is touched.

  Raises:
    UserError: one line naming the field, its value, the choices and the remedy.
  """
  known = set(field_names(default_config()))
  for name in field_names(config):
    if name not in known:
      raise unknown_field(name)
  missing = sorted(known - set(field_names(config)))
  if missing:
    raise UserError(f"{missing[0]}: missing; derive the config from hamu_jax.config.default_config()")
  choice("config.pairing", config.pairing, PAIRINGS)
  choice("config.model.name", config.model.name, (*models.MODELS, LANGUAGE_MODEL))
  choice("config.method.name", config.method.name, tuple(methods.METHODS))
  if is_language(config):
    language_fields.validate(config)
  else:
    _validate_images(config)
  choice("config.train.shuffle", config.train.shuffle, data.SHUFFLES)
  choice("config.train.select", config.train.select, SELECTIONS)
  in_range("config.seed", config.seed, 0)
  in_range("config.method.seed", config.method.seed, 0)
  in_range("config.evaluate.seed", config.evaluate.seed, 0)
  in_range("config.data.seed", config.data.seed, 0)
  in_range("config.devices", config.devices, 0)
  in_range("config.checkpoint_seconds", config.checkpoint_seconds, 0)
  in_range("config.evaluate.batch_size", config.evaluate.batch_size, 1)
  in_range("config.evaluate.membership_size", config.evaluate.membership_size, 2)
  _validate_run_section("config.train", config.train)
  _validate_method(config.method)
  _validate_sam(config.sam, config.method)
  _validate_mask(config.mask, config.method)
  _validate_memorization(config.memorization)
  _validate_combinations(config)
