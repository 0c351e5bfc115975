"""Fields of the whole experiment: seeds, devices, caches, evaluation, logging, hosts."""

from hamu_jax import models
from hamu_jax.config.fields.field import MOST_EXAMPLES, Field, Section
from hamu_jax.config.kinds import Choice, Count, Flag, Number, OutputFolder, Path, Several, Text
from hamu_jax.config.modalities import AUTO, LANGUAGE_MODEL, MODALITIES
from hamu_jax.config.readers import IMAGES, MAY_RETRAIN, TEXTS, UNLEARNS, Reader, is_on, is_one_of
from hamu_jax.metrics import rouge, tofu
from hamu_jax.run import compilation

PAIRINGS = ("sequential", "vmap", "pmap")
# Bound of numbers of devices and processes.
_MOST_PROCESSES = 1_000_000

_PMAP = is_one_of("pairing", "pmap")
_SEVERAL_HOSTS = Reader(
  lambda config: config.distributed.coordinator not in ("", "auto"),
  lambda: "if config.distributed.coordinator is an address",
)
_GENERATES = TEXTS & is_on("evaluate.generate")


class _Names:
  """The keys of several tables; reads them when it is iterated."""

  def __init__(self, *tables):
    self._tables = tables

  def __iter__(self):
    return (name for table in self._tables for name in table)


SECTIONS_BEFORE = (
  Section(
    "",
    "The experiment.",
    (
      Field(
        "seed",
        41,
        Count(),
        "Seed of training, and of unlearning and evaluation unless `method.seed` or `evaluate.seed` is set.",
      ),
      Field(
        "modality",
        AUTO,
        Choice(_Names((AUTO,), MODALITIES)),
        "What the examples are; auto is texts where `model.name` is llama, else images.",
      ),
      Field(
        "shared",
        (),
        Several(Text()),
        "Fields or sections that a configuration file sets for the variants that read them; other variants "
        "ignore these values instead of refusing them.",
        incidental=True,
      ),
      Field(
        "pairing",
        "sequential",
        Choice(PAIRINGS),
        "Where the two gradients of a step are computed: one after the other, together on one device, or "
        "each on half of the devices.",
      ),
      Field("devices", 0, Count(0, _MOST_PROCESSES), "Devices that pmap uses; 0 takes all.", _PMAP),
      Field(
        "stage_cache",
        "",
        OutputFolder(),
        "Folder of finished stages; empty is `stages/` inside the workdir.",
        incidental=True,
      ),
      Field(
        "compilation_cache",
        compilation.AUTO,
        Text(),
        "Folder of compiled programs, which later processes take from there; auto is "
        "`hamu_jax/compiled` in the user's folder of caches, off compiles each program anew.",
        incidental=True,
      ),
      Field("checkpoint_seconds", 60.0, Number(0, 1e9), "Seconds between two checkpoints.", incidental=True),
      Field(
        "keep_every",
        0,
        Count(),
        "Steps of unlearning between two models that are left in `kept/` of the run directory; 0 keeps none.",
        UNLEARNS,
        incidental=True,
      ),
      Field(
        "retrain",
        True,
        Flag(),
        "Whether the reference model is trained without the forget set (tug of war needs it).",
        MAY_RETRAIN,
      ),
      Field(
        "retrained",
        "",
        Path(remedy="give a file or folder of weights, or a run directory with a retrained model"),
        "The reference model, in place of training it (weights, or a run directory); empty trains it.",
        MAY_RETRAIN & is_on("retrain"),
      ),
    ),
  ),
  Section(
    "mesh",
    "How devices share arrays.",
    (
      Field(
        "mesh.weights",
        1,
        Count(1, _MOST_PROCESSES),
        "Devices of pmap that share one copy of a language model's frozen weights.",
        TEXTS & _PMAP,
      ),
    ),
  ),
  Section(
    "model",
    "The architecture, and the weights to unlearn from.",
    (
      Field("model.name", "resnet20", Choice(_Names(models.MODELS, (LANGUAGE_MODEL,))), "Architecture."),
      Field(
        "model.width",
        None,
        Count(1, 8192, optional=True),
        "Width of architectures that have one; not set: the architecture's own.",
        IMAGES,
      ),
      Field(
        "model.depth",
        None,
        Count(1, 1000, optional=True),
        "Depth of architectures that have one; not set: the architecture's own.",
        IMAGES,
      ),
      Field(
        "model.heads",
        None,
        Count(1, 1000, optional=True),
        "Attention heads of architectures that have them; not set: the architecture's own.",
        IMAGES,
      ),
      Field(
        "model.stages",
        None,
        Several(Count(1, 1000), least=1, optional=True),
        "Blocks of each stage of architectures that have stages; not set: the architecture's own.",
        IMAGES,
      ),
      Field(
        "model.weights",
        "",
        Path(remedy="give a safetensors file, or a folder with one"),
        "Trained weights to unlearn from (safetensors file or folder); empty pretrains.",
      ),
    ),
  ),
)

SECTIONS_AFTER = (
  Section(
    "evaluate",
    "How models are evaluated.",
    (
      Field(
        "evaluate.seed",
        None,
        Count(optional=True),
        "Seed of the examples that attacks learn from; not set: `seed`.",
        IMAGES & is_on("evaluate.membership"),
      ),
      Field("evaluate.batch_size", 1000, Count(1, 1_000_000), "Images in a batch of evaluation.", IMAGES),
      Field(
        "evaluate.membership",
        False,
        Flag(),
        "Whether support vector machines and thresholds attack the final models (membership inference).",
        IMAGES,
      ),
      Field(
        "evaluate.membership_size",
        10_000,
        Count(2),
        "Largest number of retain, and of test, examples that the attack learns from; its cost is quadratic.",
        IMAGES & is_on("evaluate.membership"),
      ),
      Field(
        "evaluate.max_examples",
        0,
        Count(),
        "Largest number of examples of a split that are evaluated; 0 takes all.",
        TEXTS,
      ),
      Field(
        "evaluate.batch_tokens",
        8192,
        Count(1, MOST_EXAMPLES),
        "Largest number of tokens in a batch of evaluation.",
        TEXTS,
      ),
      Field(
        "evaluate.generate",
        True,
        Flag(),
        "Whether answers are generated for TOFU's scores.",
        TEXTS,
      ),
      Field("evaluate.new_tokens", 200, Count(1, 100_000), "Most tokens of a generated answer.", _GENERATES),
      Field(
        "evaluate.min_k_fraction",
        0.1,
        Number(0, 1, open_low=True),
        "Share of an answer's tokens that Min-K% averages.",
        TEXTS,
      ),
      Field(
        "evaluate.tofu_variant",
        "geometric",
        Choice(tofu.VARIANTS),
        "Published form of TOFU's scores, see `metrics.tofu`.",
        _GENERATES,
      ),
      Field(
        "evaluate.rouge_words",
        "latin",
        Choice(rouge.WORDS),
        "Words of ROUGE: runs of a-z and 0-9, as published, or words of any script.",
        _GENERATES,
      ),
      Field(
        "evaluate.watermark_tokenizer",
        "",
        Path(remedy="give a folder with a tokenizer, or a hub id such as owner/name", hub=True),
        "WaterDrum: folder or hub id of the tokenizer of the watermarks; empty leaves the watermark out.",
        TEXTS,
      ),
      Field(
        "evaluate.watermark_key",
        1,
        Count(1),
        "WaterDrum: key of the watermarks.",
        TEXTS & is_on("evaluate.watermark_tokenizer"),
      ),
    ),
  ),
  Section(
    "wandb",
    "Weights & Biases.",
    (
      Field("wandb.project", "", Text(), "Project to log to; empty does not log there.", incidental=True),
      Field("wandb.name", "", Text(), "Name of the run.", is_on("wandb.project"), incidental=True),
      Field("wandb.entity", "", Text(), "Owner of the project.", is_on("wandb.project"), incidental=True),
      Field(
        "wandb.tags",
        (),
        Several(Text(pattern=".{1,64}", form="text of at most 64 characters"), distinct=True),
        "Words by which runs are filtered.",
        is_on("wandb.project"),
        incidental=True,
      ),
      Field(
        "wandb.group",
        "",
        Text(pattern=".{1,128}", form="text of at most 128 characters"),
        "Group of the run, such as the name of a sweep.",
        is_on("wandb.project"),
        incidental=True,
      ),
      Field(
        "wandb.notes",
        "",
        Text(lines=True),
        "Description of the run.",
        is_on("wandb.project"),
        incidental=True,
      ),
      Field(
        "wandb.mode",
        "online",
        Choice(("online", "offline", "disabled")),
        "Whether the run is uploaded.",
        is_on("wandb.project"),
        incidental=True,
      ),
    ),
  ),
  Section(
    "distributed",
    "Runs of several processes.",
    (
      Field(
        "distributed.coordinator",
        "",
        Text(pattern=r"auto|\S+:\d{1,5}", form="HOST:PORT, auto or empty"),
        "HOST:PORT of process 0, or auto on a TPU pod or under SLURM; empty for one host.",
        incidental=True,
      ),
      Field(
        "distributed.num_processes",
        1,
        Count(1, _MOST_PROCESSES),
        "Number of processes.",
        _SEVERAL_HOSTS,
        incidental=True,
      ),
      Field(
        "distributed.process_id",
        0,
        Count(0, _MOST_PROCESSES),
        "Number of this process.",
        _SEVERAL_HOSTS,
        incidental=True,
      ),
    ),
  ),
)
