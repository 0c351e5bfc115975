"""Fields of the dataset and of the choice of its forget set."""

import pathlib

from hamu_jax import data
from hamu_jax.config.fields.field import Field, Section
from hamu_jax.config.kinds import Choice, Count, Flag, Number, Path, Several, Text
from hamu_jax.config.readers import ESTIMATE, IMAGES, TEXTS, Reader, is_none_of, is_one_of
from hamu_jax.data import text
from sam_jax import memorization

# What the package's own sources do not read; a source that is added to the tables may read everything.
# By their names, `hamu_jax.plan` knows the sizes of datasets in parquet files, too.
_HAS_NAME = is_none_of("data.source", "digits", "cifar10_binary", "authors")
_HAS_PATH = is_none_of("data.source", "digits", "authors")
_HAS_COLUMNS = IMAGES & is_none_of("data.source", "digits", "cifar10_binary")
_HAS_SUBSETS = is_none_of("data.source", "digits", "cifar10_binary", "tfds", "authors")
_BY_CLASS = IMAGES & is_one_of("data.forget", "class", "class_size", "hard_probability")
_BY_SIZE = IMAGES & is_one_of("data.forget", "random_size", "class_size", "memorization")
_BY_SCORES = IMAGES & is_one_of("data.forget", "memorization")
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

  def __iter__(self):
    return iter(dict.fromkeys((*data.SOURCES, *text.TEXT_SOURCES)))


SECTIONS = (
  Section(
    "data",
    "The dataset, and which of its examples are forgotten.",
    (
      Field("data.source", "huggingface", Choice(_Sources()), "Where the examples come from."),
      Field("data.name", "uoft-cs/cifar10", Text(), "Hub id, or name at TFDS.", _HAS_NAME),
      Field(
        "data.path",
        "",
        Path(),
        "Local folder, file or archive to read instead; for tfds and huggingface the cache.",
        _HAS_PATH,
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
        IMAGES,
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
      Field("data.test_split", "", Text(), "Evaluation split at the source; empty is test.", _HAS_COLUMNS),
      Field("data.subset", "", Text(), "Configuration of a dataset that has several.", _HAS_SUBSETS),
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
)
