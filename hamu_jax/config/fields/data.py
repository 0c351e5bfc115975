"""Fields of the dataset and of the choice of its forget set."""

import pathlib

from hamu_jax import data
from hamu_jax.config.fields.field import Field, Section
from hamu_jax.config.kinds import Choice, Count, Flag, Number, Path, Several, Text
from hamu_jax.config.readers import ESTIMATE, IMAGES, TEXTS, Reader, is_none_of, is_on, is_one_of, value_of
from hamu_jax.data import text
from sam_jax import memorization

# What the package's own sources do not read; a source that is added to the tables may read everything.
# By their names, `hamu_jax.plan` knows the sizes of datasets in parquet files, too.
_WITHOUT_NAME = ("digits", "cifar10_binary", "authors")
_WITHOUT_PATH = ("digits", "authors")
_WITHOUT_COLUMNS = ("digits", "cifar10_binary")
_WITHOUT_SUBSETS = ("digits", "cifar10_binary", "tfds", "authors")
_HAS_COLUMNS = IMAGES & is_none_of("data.source", *_WITHOUT_COLUMNS)
_BY_CLASS = IMAGES & is_one_of("data.forget", "class", "class_size", "hard_probability")
_BY_SIZE = IMAGES & is_one_of("data.forget", "random_size", "class_size", "memorization")
_BY_SCORES = IMAGES & is_one_of("data.forget", "memorization")
_SEPARATE = IMAGES & is_one_of("data.forget", "separate")
_DRAWS_IMAGES = IMAGES & Reader(
  lambda config: bool(
    config.data.train_size
    or config.data.test_size
    or config.data.validation_fraction
    or config.data.forget in ("hard_probability", "random", "random_size", "class_size")
  ),
  lambda: "if images are drawn (train_size, test_size, validation_fraction, forget sets at random)",
)
_DRAWS_TEXTS = TEXTS & Reader(
  lambda config: (
    bool(config.text.retain_size or config.text.forget_size or config.text.test_size)
    or config.data.source not in ("tofu", "waterdrum", "question_answer", "text")
  ),
  lambda: "if texts are drawn (retain_size, forget_size, test_size) or invented (source 'authors')",
)


class _Sources:
  """All sources of images and of texts; reads the tables when it is iterated."""

  def __init__(self, *others: str):
    self._others = others

  def __iter__(self):
    return iter(dict.fromkeys((*self._others, *data.SOURCES, *text.TEXT_SOURCES)))


def _place_section(role: str, about: str, reader: Reader) -> Section:
  """The section of the dataset of a role that has its own, with the fields of `separate.Place`."""
  prefix = f"data.{role}_set"

  def unless(sources: tuple[str, ...]) -> Reader:
    shown = ", ".join(map(repr, sources))
    return reader & Reader(
      lambda config: (value_of(config, f"{prefix}.source") or config.data.source) not in sources,
      lambda: f"if config.{prefix}.source (or, where it is empty, config.data.source) is none of {shown}",
    )

  columns = unless(_WITHOUT_COLUMNS)
  return Section(
    prefix,
    f"{about}; what is empty is that of `data`, unless source, name or path say that it is another dataset.",
    (
      Field(f"{prefix}.source", "", Choice(_Sources("")), "Where its examples come from.", reader),
      Field(f"{prefix}.name", "", Text(), "Its hub id, or name at TFDS.", unless(_WITHOUT_NAME)),
      Field(f"{prefix}.path", "", Path(), "Its local folder or file, or the cache.", unless(_WITHOUT_PATH)),
      Field(f"{prefix}.subset", "", Text(), "Its configuration.", unless(_WITHOUT_SUBSETS)),
      Field(f"{prefix}.input_key", "", Text(), "Its column of images or questions.", columns),
      Field(f"{prefix}.target_key", "", Text(), "Its column of class numbers or answers.", columns),
    ),
  )


SECTIONS = (
  Section(
    "data",
    "The dataset, and which of its examples are forgotten.",
    (
      Field("data.source", "huggingface", Choice(_Sources()), "Where the examples come from."),
      Field(
        "data.name",
        "uoft-cs/cifar10",
        Text(),
        "Hub id, or name at TFDS.",
        is_none_of("data.source", *_WITHOUT_NAME),
      ),
      Field(
        "data.path",
        "",
        Path(),
        "Local folder, file or archive to read instead; for tfds and huggingface the cache.",
        is_none_of("data.source", *_WITHOUT_PATH),
      ),
      Field(
        "data.image_key",
        "",
        Text(),
        "Column of the images; empty takes the only one that fits.",
        _HAS_COLUMNS,
      ),
      Field(
        "data.label_key",
        "",
        Text(),
        "Column of the class numbers; empty takes the only one that fits.",
        _HAS_COLUMNS,
      ),
      Field(
        "data.train_size",
        0,
        Count(),
        "Training examples, class-balanced and drawn with `data.seed`; 0 takes all.",
        IMAGES & is_none_of("data.forget", "separate"),
      ),
      Field(
        "data.test_size",
        0,
        Count(),
        "Test examples, class-balanced and drawn with `data.seed`; 0 takes all.",
        IMAGES,
      ),
      Field(
        "data.mean",
        (0.4914, 0.4822, 0.4465),
        Several(Number(0, 1), least=1),
        "Mean of each channel of the images, in [0, 1].",
        IMAGES,
      ),
      Field(
        "data.std",
        (0.2023, 0.1994, 0.2010),
        Several(Number(1e-4, 100), least=1),
        "Standard deviation of each channel.",
        IMAGES,
      ),
      Field("data.seed", 41, Count(), "Seed of the draws of examples.", _DRAWS_IMAGES | _DRAWS_TEXTS),
      Field(
        "data.train_split",
        "",
        Text(),
        "Split at the source to learn, or to retain if the forget set is separate; empty is train.",
        _HAS_COLUMNS,
      ),
      Field("data.test_split", "", Text(), "Evaluation split at the source; empty is test.", _HAS_COLUMNS),
      Field("data.forget_split", "", Text(), "Split of the separate forget set; empty is train.", _SEPARATE),
      Field(
        "data.duplicate_split",
        "",
        Text(),
        "Split of near duplicates that are retained beside `train_split`; empty for none.",
        _SEPARATE,
      ),
      Field(
        "data.subset",
        "",
        Text(),
        "Configuration of a dataset that has several.",
        is_none_of("data.source", *_WITHOUT_SUBSETS),
      ),
      Field(
        "data.image_size",
        0,
        Count(0, 4096),
        "Side to which images are resized and cropped; 0 takes them as they are, all of one size.",
        IMAGES,
      ),
      Field(
        "data.stream",
        False,
        Flag(),
        "Whether images are decoded as they are needed instead of held in memory; needs `image_size`.",
        IMAGES,
      ),
      Field(
        "data.validation_fraction",
        0.0,
        Number(0, 0.9),
        "Share of each class's training examples that no stage learns from, drawn with `data.seed`.",
        IMAGES,
      ),
      Field("data.forget", "class", Choice(data.FORGET_KINDS), "How the forget set is chosen.", IMAGES),
      Field(
        "data.forget_class", (0,), Several(Count(), least=1, distinct=True), "Classes to forget.", _BY_CLASS
      ),
      Field(
        "data.hard_probability",
        0.0,
        Number(0, 1),
        "rho: share of the forgotten class that is replaced by other examples.",
        IMAGES & is_one_of("data.forget", "hard_probability"),
      ),
      Field(
        "data.forget_fraction",
        0.1,
        Number(0, 1, open_low=True),
        "Share of all training examples to forget.",
        IMAGES & is_one_of("data.forget", "random"),
      ),
      Field(
        "data.forget_indices",
        "",
        Path(
          is_there=pathlib.Path.is_file, what="file", remedy="give a .npy, .npz, .json or .txt of numbers"
        ),
        "File of example numbers (.npy, .npz, .json, .txt).",
        IMAGES & is_one_of("data.forget", "indices"),
      ),
      Field(
        "data.scores",
        "",
        Path(
          is_there=pathlib.Path.is_file,
          what="file",
          remedy=f"give a .npz or .npy of scores, or {ESTIMATE!r} to let an ensemble estimate them",
          others=(ESTIMATE,),
        ),
        "Memorization scores: a published file (.npz, .npy), or estimate to train an ensemble for them.",
        _BY_SCORES,
      ),
      Field(
        "data.memorization_level",
        "high",
        Choice(memorization.LEVELS),
        "Which examples are forgotten, by their scores.",
        _BY_SCORES,
      ),
      Field("data.forget_size", 3000, Count(1), "Number of examples to forget.", _BY_SIZE),
      Field(
        "data.duplicates",
        0,
        Count(0, 1000),
        "Exact copies of the forget set added to the retain set.",
        IMAGES,
      ),
    ),
  ),
  _place_section("forget", "Dataset of the forget set", _SEPARATE | TEXTS),
  _place_section(
    "duplicate",
    "Dataset of the duplicates of the forget set",
    (_SEPARATE & is_on("data.duplicate_split")) | (TEXTS & is_on("text.duplicate_split")),
  ),
  _place_section("test", "Dataset of the test set", IMAGES | (TEXTS & is_on("text.test_split"))),
)
