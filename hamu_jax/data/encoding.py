"""Question-answer texts as token ids, with the position at which the answer starts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hamu_jax.errors import UserError
from hamu_jax.models.tokenizer import Tokenizer

TEMPLATES = ("chat", "llama2", "question_answer", "none")
ON_LONG = ("error", "truncate")

# After this character SentencePiece adds no space of its own, and it merges nothing with it.
_MARK = "\n"


class Encoded(NamedTuple):
  """Encoded training examples.

  The loss is on the tokens from `answer_start` on: the answer and the end-of-text token.

  Attributes:
    ids: N arrays of int32, each prompt + answer + end-of-text token.
    answer_start: [N] int32, index of the first token of the answer; at least 1.
    truncated: number of examples that were cut to the longest length allowed; these lack the end-of-text
      token.
  """

  ids: tuple[np.ndarray, ...]
  answer_start: np.ndarray
  truncated: int


def encode(
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  answers: Sequence[str],
  *,
  template: str,
  system: str | None = None,
  max_length: int,
  fixed: bool = False,
  on_long: str = "error",
) -> Encoded:
  """Encodes questions and their answers.

  Prompt and answer are encoded as one text. The last token of the prompt may merge with the first of the
  answer, so that the text's tokens do not begin with the prompt's own. The answer is then encoded as a
  continuation of the prompt's tokens instead. So an example always begins with the tokens of
  `encode_prompts`, which the model continues when it generates.

  Args:
    tokenizer: the model's tokenizer.
    prompts: N questions; "" for template "none".
    answers: N answers, or with template "none" the texts.
    template: how prompt and answer become one text,
      "chat": the model's own chat template, up to the token that ends the answer;
      "llama2": "[INST] {question} [/INST]{answer}", TOFU's format for Llama 2;
      "question_answer": "Question: {question}\\nAnswer: {answer}", TOFU's format for Phi;
      "none": "{answer}", a plain text with the loss on every token but the first.
      All but "chat" start with the beginning-of-text token where the tokenizer adds one.
    system: the system message, for "chat" and "llama2". None or "" leaves it out; some chat templates
      then insert their own.
    max_length: largest number of tokens of an example, the end-of-text token included.
    fixed: whether this is the model's limit, so that it cannot be raised.
    on_long: what to do with longer examples. "error" refuses them, "truncate" drops tokens from the
      right, but never a whole answer.

  Returns:
    The examples, in the order given.

  Raises:
    UserError: an answer is empty, an example is too long, or the template does not fit.

  Source: `data_module.py` and `config/model_config.yaml` of TOFU for the formats. There, the loss
    of Phi's format is on "Answer: " too.
  """
  _check(template, system)
  if on_long not in ON_LONG:
    raise UserError(f"config.text.on_long={on_long!r}: choose one of {', '.join(ON_LONG)}")
  _check_texts(prompts, answers, template)
  heads = [_prompt(tokenizer, prompt, template, system) for prompt in prompts]
  texts = [_text(tokenizer, *row, template, system) for row in zip(prompts, heads, answers, strict=True)]
  start = _start(tokenizer, template)
  ids, answer_start = [], []
  encoded = zip(tokenizer.encode_batch(heads), tokenizer.encode_batch(texts), strict=True)
  for row, (head, whole) in enumerate(encoded):
    if whole[: len(head)] == head:
      tail = whole[len(head) :]
    else:
      tail = _continuation(tokenizer, texts[row][len(heads[row]) :])
    ids.append(np.array([*start, *head, *_ended(tokenizer, tail, template)], np.int32))
    answer_start.append(max(1, len(start) + len(head)))
  truncated = _check_lengths(ids, answer_start, max_length, fixed, on_long)
  return Encoded(tuple(each[:max_length] for each in ids), np.array(answer_start, np.int32), truncated)


def encode_prompts(
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  *,
  template: str,
  system: str | None = None,
) -> tuple[np.ndarray, ...]:
  """Encodes the prompts that a model continues when it answers.

  Args:
    tokenizer: the model's tokenizer.
    prompts: N questions; with template "none", the beginnings of texts.
    template: see `encode`.
    system: see `encode`.

  Returns:
    N arrays of int32, each the tokens before `answer_start` of that question's example. With template
    "none" it is the beginning-of-text token, if there is one, and the given beginning of a text.

  Raises:
    UserError: the template does not fit, or there is nothing to continue.
  """
  _check(template, system)
  start = _start(tokenizer, template)
  heads = tokenizer.encode_batch([_prompt(tokenizer, prompt, template, system) for prompt in prompts])
  ids = tuple(np.array([*start, *head], np.int32) for head in heads)
  for row, each in enumerate(ids):
    if not len(each):
      raise UserError(
        f"row {row} of {len(ids)}: config.text.template={template!r} leaves nothing to continue,"
        " as the prompt is empty and the tokenizer has no beginning-of-text token; give a prompt"
      )
  return ids


def _check(template, system) -> None:
  if template not in TEMPLATES:
    raise UserError(f"config.text.template={template!r}: choose one of {', '.join(TEMPLATES)}")
  if system and template not in ("chat", "llama2"):
    raise UserError(
      f"config.text.system_prompt={system!r}: template {template!r} has no place for it; leave it"
      " empty, or set config.text.template to 'chat' or 'llama2'"
    )


def _check_texts(prompts, answers, template) -> None:
  """Refuses questions without an answer, and prompts where there is no place for them."""
  if len(prompts) != len(answers):
    raise UserError(f"{len(prompts)} prompts have {len(answers)} answers; each needs one")
  for row, answer in enumerate(answers):
    if not answer.strip():
      raise UserError(f"row {row} of {len(answers)}: the answer is empty; drop or fill the row")
  if template == "none" and any(prompts):
    row = next(row for row, prompt in enumerate(prompts) if prompt)
    raise UserError(
      f"config.text.template='none': takes plain texts, but row {row} has a prompt; choose one of"
      f" {', '.join(TEMPLATES[:-1])}"
    )


def _start(tokenizer, template) -> tuple[int, ...]:
  """A chat template writes the beginning-of-text token itself."""
  bos = tokenizer.bos_token_id
  return () if template == "chat" or bos is None else (bos,)


def _prompt(tokenizer, prompt, template, system) -> str:
  """The text before the answer. A space between them belongs to the answer's first token."""
  if template == "chat":
    return tokenizer.chat_prompt(prompt, system or None)
  if template == "llama2":
    system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return f"[INST] {system}{prompt} [/INST]"
  if template == "question_answer":
    return f"Question: {prompt}\nAnswer:"
  return prompt


def _text(tokenizer, prompt, head, answer, template, system) -> str:
  """The whole text, which begins with `head`."""
  if template != "chat":
    return head + (" " if template == "question_answer" else "") + answer
  text = tokenizer.chat(prompt, answer, system or None)
  if not text.startswith(head):
    raise UserError(
      "config.text.template='chat': the model's chat template writes an answered question"
      " otherwise than its prompt for an answer, so where the answer starts is unknown; choose"
      f" one of {', '.join(TEMPLATES[1:])}"
    )
  return text


def _continuation(tokenizer, text) -> list[int]:
  """Tokens of a text that continues another, without the space that SentencePiece puts before a text."""
  mark, marked = tokenizer.encode(_MARK), tokenizer.encode(_MARK + text)
  follows = marked[: len(mark)] == mark
  return marked[len(mark) :] if follows else tokenizer.encode(text)


def _ended(tokenizer, tail, template) -> list[int]:
  """Ends an answer with one end-of-text token; text that a chat template writes after its own is cut."""
  ends = [index for index, token in enumerate(tail) if token in tokenizer.eos_token_ids]
  if template == "chat" and ends:
    return tail[: ends[-1] + 1]
  return [*tail, tokenizer.eos_token_ids[0]]


def _check_lengths(ids, answer_start, max_length, fixed, on_long) -> int:
  """Returns the number of examples that are too long, or refuses them."""
  lengths = np.array([len(each) for each in ids], np.int64)
  long = np.flatnonzero(lengths > max_length)
  if not len(long):
    return 0
  longest = int(np.argmax(lengths))
  limit = "the model's limit of" if fixed else "config.text.max_length="
  size = f"{len(long)} of {len(ids)} examples are longer than {limit}{' ' * fixed}{max_length}"
  raised = "choose a model with more positions (config.language)" if fixed else "raise config.text.max_length"
  if on_long == "error":
    raise UserError(
      f"{size} tokens, the longest, row {longest}, has {lengths[longest]}; {raised}, or set"
      " config.text.on_long='truncate'"
    )
  starts = np.array(answer_start)
  if len(full := np.flatnonzero(starts >= max_length)):
    row = int(full[np.argmax(starts[full])])
    raise UserError(
      f"{size} tokens, and {len(full)} have no room for an answer: the prompt of row {row} alone"
      f" takes {starts[row]}; {raised}"
    )
  return len(long)
