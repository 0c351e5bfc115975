"""Fields of training, sharpness, masks and the memorization ensemble."""

import pathlib

import sam_jax
from hamu_jax import data
from hamu_jax.config.fields.field import MOST_EXAMPLES, Field, Section, optimizer_section, training_fields
from hamu_jax.config.kinds import Choice, Count, Flag, Number, Path, Several
from hamu_jax.config.readers import (
  ENSEMBLE,
  IMAGES,
  MASKED,
  NEVER,
  PAIRS,
  PERTURBED,
  SHARED_MODE,
  TEXTS,
  TRAINS,
  UNLEARNS,
  is_off,
  is_on,
)
from hamu_jax.engine import sub_step

SELECTIONS = ("best", "last")
_MAKES_MASKS = IMAGES & UNLEARNS & is_on("mask.fraction") & is_off("mask.path")

SECTIONS = (
  Section(
    "train",
    "Pretraining on all examples, and retraining of the reference on the retained ones.",
    (
      *training_fields(
        "train",
        TRAINS,
        epochs=50,
        batch_size=5000,
        clip_norm=0.0,
        evaluate_epochs=1.0,
        augments=IMAGES & TRAINS,
      ),
      Field(
        "train.shuffle",
        "each_epoch",
        Choice(data.SHUFFLES),
        "each_epoch reshuffles; once keeps the first order, as the reference does.",
        TRAINS,
      ),
      Field(
        "train.select",
        "best",
        Choice(SELECTIONS),
        "Which model is kept: the last, or the best evaluated one (on validation examples where there are "
        "some, else by the mean of retain and forget accuracy); language models need last.",
        TRAINS | TEXTS,
      ),
    ),
  ),
  optimizer_section("train", "adamw", 1e-3, TRAINS),
  Section(
    "sam",
    "Sharpness-aware gradients.",
    (
      Field(
        "sam.rho",
        0.0,
        Number(0, 1000),
        "Radius of the perturbation in unlearning; 0 takes plain gradients.",
        UNLEARNS,
        traced=True,
        off_at_zero=True,
      ),
      Field(
        "sam.train_rho",
        0.0,
        Number(0, 1000),
        "Radius of the perturbation in pretraining and retraining; 0 takes plain gradients.",
        TRAINS,
        traced=True,
        off_at_zero=True,
      ),
      Field(
        "sam.adaptive",
        False,
        Flag(),
        "Whether the radius of each weight is proportional to its size.",
        PERTURBED,
      ),
      Field(
        "sam.lamb",
        1.0,
        Number(-1000, 1000),
        "Weight of the difference between the perturbed and the plain gradient.",
        PERTURBED,
        traced=True,
      ),
      Field(
        "sam.mode",
        "min",
        Choice(sam_jax.MODES),
        "In unlearning, min seeks flat regions and max sharp ones.",
        UNLEARNS & is_on("sam.rho") & SHARED_MODE,
      ),
      Field(
        "sam.train_mode",
        "min",
        Choice(sam_jax.MODES),
        "The same in pretraining and retraining.",
        TRAINS & is_on("sam.train_rho"),
      ),
      Field(
        "sam.scope",
        "auto",
        Choice(sub_step.SCOPES),
        "step: both roles at the point that their joint gradient leads to; role: each at its own; auto: step "
        "for methods that descend one loss, role for hamu, gru and pcgrad.",
        UNLEARNS & is_on("sam.rho") & PAIRS,
      ),
    ),
  ),
  Section(
    "mask",
    "Weights that the forget set moves most: only they unlearn (any method), or they unlearn and all others "
    "retain (sharp_minmax).",
    (
      Field(
        "mask.fraction",
        0.0,
        Number(0, 1),
        "Share of the weights, one of `fractions`; 0 uses no mask.",
        IMAGES & UNLEARNS & is_off("mask.path"),
      ),
      Field(
        "mask.fractions",
        (0.1, 0.3, 0.5),
        Several(Number(0, 1, open_low=True), least=1, distinct=True),
        "Shares for which the mask stage makes a mask.",
        _MAKES_MASKS,
      ),
      Field(
        "mask.batch_size",
        256,
        Count(1, MOST_EXAMPLES),
        "Forget examples in a batch of the mask stage.",
        _MAKES_MASKS,
      ),
      Field(
        "mask.select",
        "largest",
        Choice(sam_jax.SELECTIONS),
        "Which weights are marked, by their gradients; smallest is what the sharpness paper's code does.",
        _MAKES_MASKS,
      ),
      Field(
        "mask.scope",
        "update",
        Choice(sub_step.MASK_SCOPES),
        "update: weights outside the mask do not move; gradient: weight decay still moves them; perturbed: "
        "the plain gradient of a sharpness-aware one moves them, too, as in the paper's code.",
        IMAGES & UNLEARNS & MASKED,
      ),
      Field(
        "mask.path",
        "",
        Path(
          is_there=pathlib.Path.is_file,
          what="file",
          remedy="give a mask.safetensors of another run, or leave it empty to compute the mask",
        ),
        "A mask file (safetensors) instead of the mask stage.",
        IMAGES & UNLEARNS,
      ),
    ),
  ),
  Section(
    "memorization",
    "The ensemble that estimates memorization scores.",
    (
      Field("memorization.models", 64, Count(2, 100_000), "Number of models.", ENSEMBLE),
      Field(
        "memorization.fraction",
        0.7,
        Number(0, 0.999, open_low=True),
        "Share of the training examples that each model sees.",
        ENSEMBLE,
      ),
      Field(
        "memorization.parallel",
        8,
        Count(1, 100_000),
        "Models trained at once in one program.",
        ENSEMBLE,
        incidental=True,
      ),
      *training_fields(
        "memorization",
        ENSEMBLE,
        epochs=10.0,
        batch_size=128,
        clip_norm=0.0,
        evaluate_epochs=0.0,
        augments=ENSEMBLE,
        # The models of an ensemble are evaluated once, when their training has ended.
        evaluates=NEVER,
      ),
    ),
  ),
  optimizer_section("memorization", "adamw", 1e-3, ENSEMBLE),
)
