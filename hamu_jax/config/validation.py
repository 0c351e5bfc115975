"""Checks a configuration before data is loaded or a device is touched."""

from collections.abc import Collection

import ml_collections

from hamu_jax import data
from hamu_jax.config import modalities, paths
from hamu_jax.config.default import build_model, field_names, places, unknown_field
from hamu_jax.config.fields import FIELDS, Field
from hamu_jax.config.kinds import choice
from hamu_jax.config.modalities import LANGUAGE_MODEL
from hamu_jax.config.readers import ESTIMATE, MASKED, method_of, value_of
from hamu_jax.data import text
from hamu_jax.engine import methods, optimizers
from hamu_jax.errors import UserError


def validate(config: ml_collections.ConfigDict, given: Collection[str] = ()) -> None:
  """Checks all that a configuration alone can tell, and the files and folders that it names.

  Args:
    config: complete, as derived from `default_config()`.
    given: dotted names, without "config", of the fields that the command line or a sweep sets. One that
      nothing reads is refused even where the configuration file shares it (`config.shared`).

  Raises:
    UserError: one line naming the field, its value, the choices and the remedy.
  """
  validate_values(config, given)
  paths.check(config, frozenset(name for name in FIELDS if is_read(config, name)))


def validate_values(config: ml_collections.ConfigDict, given: Collection[str] = ()) -> None:
  """`validate` without a look at files, which may be on another machine."""
  _check_names(config)
  for name, field in FIELDS.items():
    field.check(value_of(config, name))
  _check_shared(config)
  modality = modalities.name_of(config)
  if modality == modalities.TEXTS:
    _validate_texts(config)
  elif modality == modalities.IMAGES:
    _validate_images(config)
  modalities.MODALITIES[modality].validate(config)
  _refuse_unread(config, given)
  for section in ("train", "method", "memorization"):
    _validate_optimizer(section, config)
  _validate_method(config.method)
  _validate_sam(config)
  _validate_mask(config)
  _validate_processes(config.distributed)


def unread_fields(config: ml_collections.ConfigDict) -> list[Field]:
  """The fields that have another value than their default although nothing reads them."""
  return [
    field
    for name, field in FIELDS.items()
    if _is_set(field, value_of(config, name)) and not is_read(config, name)
  ]


def is_read(config: ml_collections.ConfigDict, name: str) -> bool:
  """Whether something reads a field, by its dotted name without "config"."""
  reads = modalities.MODALITIES[modalities.name_of(config)].reads
  return FIELDS[name].reader.holds(config) or _covers(reads, name)


def _is_set(field: Field, value) -> bool:
  """Whether a value is neither the default nor empty."""
  value = tuple(value) if isinstance(value, list) else value
  return value != field.default and value not in (None, "", ())


def _covers(names: Collection[str], name: str) -> bool:
  """Whether a field or its section is among some names."""
  return any(name == one or name.startswith(f"{one}.") for one in names)


def _refuse_unread(config: ml_collections.ConfigDict, given: Collection[str]) -> None:
  for field in unread_fields(config):
    if _covers(config.shared, field.name) and field.name not in given:
      continue
    raise UserError(
      f"config.{field.name}={value_of(config, field.name)!r}: nothing reads it here; it is read "
      f"{field.reader.says()}; leave it at {field.default!r}, or name it in config.shared of the "
      "configuration file if it is for other variants"
    )


def _check_names(config: ml_collections.ConfigDict) -> None:
  """Raises a UserError unless the fields are those of the table."""
  present = {name.removeprefix("config.") for name in field_names(config)}
  for name in present:
    if name not in FIELDS:
      raise unknown_field(f"config.{name}")
  missing = sorted(FIELDS.keys() - present)
  if missing:
    raise UserError(f"config.{missing[0]}: missing; derive the config from hamu_jax.config.default_config()")


def _check_shared(config: ml_collections.ConfigDict) -> None:
  for name in config.shared:
    if not any(field == name or field.startswith(f"{name}.") for field in FIELDS):
      raise UserError(
        f"config.shared={tuple(config.shared)!r}: {name!r} is neither a field nor a section; give dotted "
        "names without 'config', such as method.constraint_ratio"
      )


def _validate_optimizer(section: str, config: ml_collections.ConfigDict) -> None:
  options, epochs = config[section].optimizer, config[section].epochs
  name, warmup = f"config.{section}.optimizer", options.warmup_epochs
  for epoch in options.decay_epochs:
    if epoch <= warmup:
      raise UserError(f"{name}.decay_epochs={epoch!r}: must be above {warmup:g}, the end of the warm-up")
    if epoch >= epochs and is_read(config, f"{section}.optimizer.decay_epochs"):
      raise UserError(
        f"{name}.decay_epochs={epoch!r}: must be below config.{section}.epochs={epochs:g}, since it would "
        "never be reached; leave it out"
      )
  if options.schedule == "ft_warmup" and not warmup and is_read(config, f"{section}.optimizer.schedule"):
    raise UserError(f"{name}.schedule='ft_warmup': ramps up in warmup_epochs, which is 0; set it")
  if warmup > epochs and is_read(config, f"{section}.optimizer.warmup_epochs"):
    raise UserError(
      f"{name}.warmup_epochs={warmup!r}: must be at most config.{section}.epochs={epochs:g}, since "
      "the peak rate would never be reached; lower it"
    )
  try:
    optimizers.make_optimizer(options, options.learning_rate)
  except UserError as error:
    raise UserError(f"config.{section}.{error}") from error


def _validate_processes(config: ml_collections.ConfigDict) -> None:
  if config.process_id >= config.num_processes:
    raise UserError(
      f"config.distributed.process_id={config.process_id}: must be below config.distributed.num_processes="
      f"{config.num_processes}; number the processes from 0"
    )


def _validate_method(config: ml_collections.ConfigDict) -> None:
  method = methods.METHODS[config.name]
  if not isinstance(config.batch_size, int) and method.layout != "paired":
    raise UserError(
      f"config.method.batch_size={tuple(config.batch_size)!r}: {config.name} reads one stream of both sets; "
      "give one number"
    )
  if config.batch_norm == "batch" and config.microbatch:
    raise UserError(
      f"config.method.microbatch={config.microbatch}: batch norm needs the statistics of the whole "
      "batch; set it to 0 or config.method.batch_norm to 'frozen'"
    )
  if config.repeats > 1 and (method.layout == "passes" or "l1" in method.used_terms):
    raise UserError(
      f"config.method.repeats={config.repeats}: {config.name} counts single epochs; set it to 1"
    )
  if config.repeats > max(config.epochs, 1) and method.unlearns:
    raise UserError(
      f"config.method.repeats={config.repeats}: must be at most config.method.epochs={config.epochs:g}, "
      "since a run cannot be shorter than one joined epoch; lower it"
    )
  if "constraint" in method.reads:
    _validate_constraint(config)


def _validate_constraint(config: ml_collections.ConfigDict) -> None:
  """Refuses a constraint that no gradients could meet; unnormalised shares have no such bound.

  Gradients are clipped to norm M. A step of the learning-rate radius then changes a loss by at most
  sum_t lr |g_r,t| |g_f,t| <= lr M^2 (Cauchy-Schwarz), and a step of fixed radius R over the whole model by
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
  if config.scope == "tensor" and not config.normalize_share and config.share != "equal":
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
  if config.stream and not config.image_size:
    raise UserError("config.data.stream=True: streamed images need one size; set config.data.image_size")
  scores = config.scores
  if config.forget == "memorization" and not scores:
    raise UserError(
      "config.data.scores='': forget sets by memorization need a score file, or "
      f"{ESTIMATE!r} to let an ensemble estimate the scores"
    )
  if config.forget == "indices" and not config.forget_indices:
    raise UserError(
      "config.data.forget_indices='': config.data.forget is 'indices', so give a file of example numbers"
    )
  if config.forget == "separate":
    _validate_separate(config)
  if len(config.mean) != len(config.std):
    raise UserError(
      f"config.data.std={tuple(config.std)!r}: needs one value a channel, as config.data.mean has"
    )


def _validate_separate(config: ml_collections.ConfigDict) -> None:
  """Refuses a forget set that is the retain set, and splits of sources that have none by name."""
  own = config.forget_set
  if not any((config.forget_split, own.source, own.name, own.path, own.subset)):
    raise UserError(
      "config.data.forget='separate': the forget set would be the retain set; name its split in "
      "config.data.forget_split, or its dataset in config.data.forget_set.name or config.data.forget_set.path"
    )
  for role in ("forget", "duplicate"):
    source, split = config[f"{role}_set"].source or config.source, config[f"{role}_split"]
    if split and source in ("digits", "cifar10_binary"):
      raise UserError(
        f"config.data.{role}_split={split!r}: the splits of {source!r} have no names; choose another "
        f"config.data.{role}_set.source"
      )


def _validate_sam(config: ml_collections.ConfigDict) -> None:
  if (
    config.sam.rho
    and config.sam.scope == "step"
    and not all(each.one_loss for each in method_of(config).substeps)
  ):
    raise UserError(
      f"config.sam.scope='step': {config.method.name} has no joint loss whose gradient could perturb both "
      "roles; set it to 'role'"
    )


def _validate_mask(config: ml_collections.ConfigDict) -> None:
  mask = config.mask
  if mask.fraction and not mask.path and mask.fraction not in mask.fractions:
    raise UserError(
      f"config.mask.fraction={mask.fraction!r}: choose from config.mask.fractions="
      f"{tuple(mask.fractions)!r}, or add it there"
    )
  if method_of(config).needs_mask and not MASKED.holds(config):
    raise UserError(
      f"config.mask.fraction=0: {config.method.name} needs a mask; choose from config.mask.fractions="
      f"{tuple(mask.fractions)!r}, or give a file as config.mask.path"
    )


def _sources(config: ml_collections.ConfigDict) -> dict[str, str]:
  """{field: source} of all datasets that name one."""
  own = {f"config.data.{role}_set.source": place.source for role, place in places(config.data).items()}
  return {"config.data.source": config.data.source} | {
    field: source for field, source in own.items() if source
  }


def _validate_images(config: ml_collections.ConfigDict) -> None:
  """Checks what only experiments on images have."""
  try:
    build_model(config.model, num_classes=2, platform="cpu")
  except UserError as error:
    raise UserError(f"config.model.{error}") from error
  for field, source in _sources(config).items():
    if source in text.TEXT_SOURCES and source not in data.SOURCES:
      raise UserError(
        f"{field}={source!r}: these are texts; set config.model.name to "
        f"{LANGUAGE_MODEL!r}, or choose from {', '.join(data.SOURCES)}"
      )
  if method_of(config).for_language:
    raise UserError(
      f"config.method.name={config.method.name!r}: is defined for language models only; choose from "
      + ", ".join(name for name, method in methods.METHODS.items() if not method.for_language)
    )
  _validate_data(config.data)
  if method_of(config).layout == "merged" and config.data.duplicates:
    raise UserError(
      f"config.data.duplicates={config.data.duplicates}: {config.method.name} labels an example by its "
      "number, so copies in the retain set would be relabelled, too; set it to 0"
    )


def _validate_texts(config: ml_collections.ConfigDict) -> None:
  """Checks what only experiments on language models have."""
  for field, source in _sources(config).items():
    choice(field, source, tuple(text.TEXT_SOURCES))
  name = config.method.name
  possible = [
    other
    for other, method in methods.METHODS.items()
    if not method.needs_mask and "l1" not in method.used_terms
  ]
  if name not in possible:
    raise UserError(f"config.method.name={name!r}: is for image models; choose from {', '.join(possible)}")
  if config.train.select != "last":
    raise UserError(f"config.train.select={config.train.select!r}: is for image models; set it to 'last'")
  if config.language.attention == "cudnn" and config.language.dtype == "float32":
    raise UserError(
      "config.language.attention='cudnn': computes in 16 bits; set config.language.dtype to 'bfloat16' "
      "or attention to 'xla'"
    )
  weights = config.mesh.weights
  if weights > 1 and config.pairing != "pmap":
    raise UserError(
      f"config.mesh.weights={weights}: weights are shared by the devices of pairing 'pmap'; set "
      "config.pairing to that"
    )
  if weights > 1 and config.language.rematerialization == "none":
    raise UserError(
      f"config.mesh.weights={weights}: without rematerialization the backward pass would keep whole weights "
      "of all layers; set config.language.rematerialization to 'full' or 'dots'"
    )
  if config.evaluate.watermark_tokenizer and not config.evaluate.generate:
    raise UserError(
      "config.evaluate.generate=False: the watermark is measured in generated answers; set it to True or "
      "config.evaluate.watermark_tokenizer to ''"
    )
