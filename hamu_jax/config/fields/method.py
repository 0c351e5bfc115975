"""Fields of the unlearning method."""

import sam_jax
from hamu_jax import data
from hamu_jax.config.fields.field import (
  LARGE,
  MOST_EPOCHS,
  MOST_EXAMPLES,
  Field,
  Section,
  only_if_unset,
  optimizer_section,
  training_fields,
)
from hamu_jax.config.kinds import Choice, Count, CountOrPair, Flag, Number
from hamu_jax.config.readers import (
  FORGETS,
  IMAGES,
  RETAINS,
  TEXTS,
  UNLEARNS,
  Reader,
  by_methods,
  is_on,
  is_one_of,
  method_of,
)
from hamu_jax.engine import methods
from hamu_jax.transforms.hamu import CRITERIA, SCOPES, SHARES
from hamu_jax.transforms.hamu_update import ON_INFEASIBLE

BATCH_NORMS = ("frozen", "batch")

_ONE_ROLE = UNLEARNS & Reader(
  lambda config: method_of(config).layout == "paired" and len(method_of(config).roles) == 1,
  lambda: "by methods of one role",
)
_SHARES_OUT = by_methods("share") & is_one_of("method.scope", "tensor")
_STOPS_ON_LOSS = UNLEARNS & is_on("method.stop_on_loss")
_SHARP = UNLEARNS & is_on("sam.rho")

_RUN = (
  Field("method.name", "hamu-q", Choice(methods.METHODS), "The unlearning method."),
  *training_fields(
    "method",
    UNLEARNS,
    epochs=25.0,
    batch_size=5000,
    batch_sizes=CountOrPair(1, MOST_EXAMPLES),
    clip_norm=1.0,
    evaluate_epochs=1.0,
    augments=IMAGES & UNLEARNS,
    about_clip="Largest norm of each role's gradient; 0 does not clip.",
  ),
  Field(
    "method.max_steps",
    0,
    Count(),
    "Number of applied steps after which the run ends; 0 ends it after `epochs`.",
    UNLEARNS,
  ),
  Field(
    "method.shuffle",
    "once",
    Choice(data.SHUFFLES),
    "once shuffles the sets once, and forget cycles on across epochs; each_epoch reshuffles them.",
    UNLEARNS,
  ),
  Field(
    "method.epoch",
    "matched",
    Choice(data.EPOCHS),
    "matched: ft and ga compute as many gradients an epoch as paired methods; pass: they read each set once.",
    _ONE_ROLE,
  ),
  Field(
    "method.batch_norm",
    "frozen",
    Choice(BATCH_NORMS),
    "frozen keeps batch norm in evaluation mode; batch trains on the statistics of each role's batch.",
    IMAGES & UNLEARNS,
  ),
  Field(
    "method.repeats",
    1,
    Count(1, 1000),
    "Copies of the data joined into one epoch, which then has fewer short batches.",
    UNLEARNS,
  ),
  Field(
    "method.seed",
    None,
    Count(optional=True),
    "Seed of the order of batches and of all random numbers of unlearning; not set: `seed`.",
    UNLEARNS,
  ),
  Field(
    "method.microbatch",
    0,
    Count(0, MOST_EXAMPLES),
    "Examples that a device differentiates at a time, over which gradients accumulate; 0 chooses a number. "
    "Language models also train with it.",
    UNLEARNS | TEXTS,
  ),
  Field(
    "method.stop_on_loss",
    False,
    Flag(),
    "Whether the run ends once the batch loss of a role has crossed its threshold.",
    UNLEARNS,
  ),
  Field(
    "method.max_retain_loss",
    0.4,
    Number(0, LARGE, open_low=True),
    "Threshold of the retain loss.",
    _STOPS_ON_LOSS & RETAINS,
    traced=True,
  ),
  Field(
    "method.min_forget_loss",
    0.1,
    Number(0, LARGE),
    "Threshold of the forget loss.",
    _STOPS_ON_LOSS & FORGETS,
    traced=True,
  ),
)

_HAMU = (
  Field(
    "method.constraint",
    None,
    Number(0, LARGE, optional=True),
    "hamu: the guaranteed first-order change of the loss; not set: given by `constraint_ratio`.",
    by_methods("constraint"),
    traced=True,
  ),
  Field(
    "method.constraint_ratio",
    0.5,
    Number(0, LARGE),
    "hamu: the constraint as a multiple of the current learning rate.",
    only_if_unset("method.constraint", by_methods("constraint_ratio")),
    traced=True,
  ),
  Field(
    "method.radius",
    None,
    Number(1e-12, LARGE, optional=True),
    "hamu: a fixed step radius; not set: the learning rate times the norm of the retain gradient.",
    by_methods("radius"),
    traced=True,
  ),
  Field("method.share", "grad_norm", Choice(SHARES), "hamu: how tensors share the constraint.", _SHARES_OUT),
  Field(
    "method.normalize_share",
    True,
    Flag(),
    "hamu: whether the shares add up to the constraint.",
    _SHARES_OUT & is_one_of("method.share", *(share for share in SHARES if share != "equal")),
  ),
  Field(
    "method.scope",
    "tensor",
    Choice(SCOPES),
    "hamu: whether each tensor or the whole model is one block.",
    by_methods("scope"),
  ),
  Field(
    "method.on_infeasible",
    "stop",
    Choice(ON_INFEASIBLE),
    "hamu: what happens where no step meets the constraint: stop, project (go as far as the radius allows) "
    "or exceed the radius (as published).",
    by_methods("on_infeasible"),
  ),
  Field(
    "method.stop_on_criterion",
    False,
    Flag(),
    "hamu: whether the run ends when the aggregate criterion is met.",
    by_methods("stop_on_criterion"),
  ),
  Field(
    "method.criterion",
    "published",
    Choice(CRITERIA),
    "hamu: the aggregate criterion; under descent, opposed gradients do not meet it.",
    by_methods("criterion"),
  ),
)

_BASELINES = (
  Field(
    "method.max_norm",
    None,
    Number(0, LARGE, open_low=True, optional=True),
    "gru, pcgrad: largest norm of the update.",
    by_methods("max_norm"),
    traced=True,
  ),
  Field(
    "method.reference_sign",
    False,
    Flag(),
    "gru, pcgrad: whether a conflict is tested with the sign of the reference code.",
    by_methods("reference_sign"),
  ),
  Field(
    "method.alpha",
    0.001,
    Number(0, LARGE),
    "scrub: weight of KL on retain.",
    by_methods("alpha"),
    traced=True,
  ),
  Field(
    "method.gamma",
    0.99,
    Number(0, LARGE),
    "scrub, scrub_distill: weight of cross-entropy on retain.",
    by_methods("gamma"),
    traced=True,
  ),
  Field(
    "method.beta",
    0.1,
    Number(0, LARGE),
    "scrub_distill: weight of KL on retain.",
    by_methods("beta"),
    traced=True,
  ),
  Field(
    "method.temperature",
    4.0,
    Number(0, 1000, open_low=True),
    "scrub_distill: temperature of KL.",
    by_methods("temperature"),
    traced=True,
  ),
  Field(
    "method.msteps",
    4,
    Count(0, MOST_EPOCHS),
    "scrub_distill: number of first epochs that ascend KL on forget.",
    by_methods("msteps"),
  ),
  Field(
    "method.retain_weight",
    0.99,
    Number(0, 1),
    "neggrad, sharp_minmax: weight w of the retain loss; the forget loss has weight w - 1.",
    by_methods("retain_weight"),
    traced=True,
  ),
  Field(
    "method.retain_mode",
    "min",
    Choice(sam_jax.MODES),
    "sharp_minmax: mode of the retain half.",
    _SHARP & by_methods("retain_mode"),
  ),
  Field(
    "method.forget_mode",
    "max",
    Choice(sam_jax.MODES),
    "sharp_minmax: mode of the forget half.",
    _SHARP & by_methods("forget_mode"),
  ),
  Field(
    "method.l1_weight",
    5e-4,
    Number(0, LARGE),
    "ft_l1: weight of the L1 norm in the first epoch, from which it falls linearly.",
    by_methods("l1_weight"),
    traced=True,
  ),
  Field(
    "method.l1_free_epochs",
    0.0,
    Number(0, MOST_EPOCHS),
    "ft_l1: number of last epochs without the L1 norm.",
    by_methods("l1_free_epochs"),
    traced=True,
  ),
)

_LANGUAGE = (
  Field(
    "method.retain_coefficient",
    1.0,
    Number(0, LARGE),
    "npo, simnpo, dpo, idk, undial, wga, rmu: weight of the retain term.",
    by_methods("retain_coefficient"),
    traced=True,
  ),
  Field(
    "method.forget_coefficient",
    1.0,
    Number(0, LARGE),
    "npo, simnpo, dpo, idk, undial, wga, rmu: weight of the forget term.",
    by_methods("forget_coefficient"),
    traced=True,
  ),
  Field(
    "method.preference_beta",
    None,
    Number(0, 1000, open_low=True, optional=True),
    "Coefficient b; not set: npo and dpo 0.1, simnpo 4.5, undial 10, wga 1.",
    by_methods("preference_beta"),
    traced=True,
  ),
  Field(
    "method.margin",
    0.0,
    Number(-LARGE, LARGE),
    "simnpo: margin by which the loss must rise.",
    by_methods("margin"),
    traced=True,
  ),
  Field("method.layer", 7, Count(0, 10_000), "rmu: layer whose states are steered.", by_methods("layer")),
  Field(
    "method.steering",
    2.0,
    Number(0, LARGE),
    "rmu: length of the vector to which states are steered.",
    by_methods("steering"),
    traced=True,
  ),
)

SECTIONS = (
  Section("method", "The unlearning method.", (*_RUN, *_HAMU, *_BASELINES, *_LANGUAGE)),
  optimizer_section("method", "sgd", 1e-4, UNLEARNS),
)
