"""Question-answer texts as token numbers, with tokenizers that merge where they should not."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from hamu_jax.data import encoding
from hamu_jax.errors import UserError
from hamu_jax.models import tokenizer

_LLAMA3_CHAT = (
  "{{ bos_token }}{% for message in messages %}{{ '<|head|>' + message.role +"
  " '<|end_head|>\n\n' + message.content + '<|eot|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|head|>assistant<|end_head|>\n\n' }}{% endif %}"
)
# That of Llama-2-chat, which closes a turn by "</s>" and opens none for the answer.
_LLAMA2_CHAT = (
  "{% if messages[0].role == 'system' %}{% set first = '<<SYS>>\n' + messages[0].content +"
  " '\n<</SYS>>\n\n' %}{% else %}{% set first = '' %}{% endif %}{% for message in messages %}"
  "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + first + message.content + ' [/INST]'"
  " }}{% elif message.role == 'assistant' %}{{ ' ' + message.content | trim + ' ' + eos_token }}"
  "{% endif %}{% endfor %}"
)
# SmolLM2's, which writes a newline after the end of a turn.
_CHATML = (
  "{% for message in messages %}{{ '<|head|>' + message.role + '\n' + message.content +"
  " '<|eot|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% endif %}"
)
_BARE_CHAT = (
  "{% for message in messages %}{{ message.role[0] + ': ' + message.content + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
)

# Texts of these meet the merges below on both sides of where an answer starts.
_TEXTS = st.text("aT]: \n1é", max_size=12)
_ANSWERS = _TEXTS.filter(str.strip)


def _save(folder, backend, template, bos, eos, more_eos):
  folder.mkdir()
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"bos_token": bos, "eos_token": eos, "chat_template": template})
  )
  (folder / "config.json").write_text(json.dumps({"eos_token_id": more_eos}))
  return tokenizer.from_folder(folder)


def _llama3(folder, template=_LLAMA3_CHAT, starts=True):
  """Byte pairs that merge across every place where an answer may start."""
  merges = [("Ċ", "Ċ"), ("Ċ", "Ġ"), ("]", "T"), (":", "Ġ"), ("Ġ", "Ġ"), (":", "Ċ"), ("Ġ", "a")]
  tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
  backend = tokenizers.Tokenizer(
    models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
  )
  # No words: whatever is adjacent may merge.
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  special = ["<|begin|>", "<|end|>", "<|head|>", "<|end_head|>", "<|eot|>"]
  backend.add_special_tokens(special)
  if starts:
    backend.post_processor = processors.TemplateProcessing(
      single=[special[0], "$A"], special_tokens=[(special[0], len(tokens))]
    )
  return _save(folder, backend, template, *special[:2], [len(tokens) + 1, len(tokens) + 4])


def _llama2(folder, template=_LLAMA2_CHAT):
  """Pieces with a space before every text, as of Llama 2's tokenizer.json."""
  characters = sorted(set("▁[INST]/<>SYQuestionAnswer:aT1uq \n"))
  merges = [("]", "T"), ("▁", "a"), ("▁", "▁"), (":", "▁"), ("▁", "[")]
  tokens = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *(character for character in characters if character not in "\n "),
    *(left + right for left, right in merges),
  ]
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=merges,
      unk_token="<unk>",
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  )
  backend.add_special_tokens(tokens[:3])
  backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
  return _save(folder, backend, template, "<s>", "</s>", 2)


@pytest.fixture(scope="module")
def makers(tmp_path_factory):
  """The tokenizers, by name."""
  root = tmp_path_factory.mktemp("tokenizers")
  return {
    "llama3": _llama3(root / "llama3"),
    "smollm": _llama3(root / "smollm", _CHATML, starts=False),
    "bare": _llama3(root / "bare", _BARE_CHAT),
    "llama2": _llama2(root / "llama2"),
    "bytes": tokenizer.byte_tokenizer(),
  }


def _one(of, prompt, answer, template, **options):
  options = {"max_length": 10_000} | options
  encoded = encoding.encode(of, [prompt], [answer], template=template, **options)
  return encoded.ids[0].tolist(), int(encoded.answer_start[0])


def _written(template, prompt, answer):
  return {
    "llama2": f"[INST] {prompt} [/INST]{answer}",
    "question_answer": f"Question: {prompt}\nAnswer: {answer}",
    "none": answer,
  }[template]


@pytest.mark.parametrize("name", ["llama3", "smollm", "bare", "llama2", "bytes"])
@pytest.mark.parametrize("template", ["chat", "llama2", "question_answer"])
def test_an_example_begins_with_its_prompt(makers, name, template):
  """Whatever merges: also what is read is what was written, and one token ends it."""
  of = makers[name]

  @hypothesis.given(_TEXTS, _ANSWERS, st.sampled_from([None, "", "T"]))
  @hypothesis.settings(max_examples=60, deadline=None)
  def check(prompt, answer, system):
    system = system if template != "question_answer" else None
    ids, start = _one(of, prompt, answer, template, system=system)
    prompts = encoding.encode_prompts(of, [prompt], template=template, system=system)
    assert prompts[0].tolist() == ids[:start]
    assert start >= 1
    ends = [index for index, token in enumerate(ids[start:]) if token in of.eos_token_ids]
    assert ends == [len(ids) - start - 1]
    if template == "chat":
      learned = {"bytes": f" {answer}", "bare": f"{answer}\n", "llama2": f"{answer.strip()} "}
      assert of.decode(ids[start:]) == learned.get(name, answer)
    elif not system:
      assert of.decode(ids) == _written(template, prompt, answer)

  check()


@pytest.mark.parametrize(
  "name, template",
  [
    ("llama3", "llama2"),
    ("llama3", "none"),
    ("llama2", "llama2"),
    ("llama2", "question_answer"),
    ("llama2", "none"),
  ],
)
def test_without_a_merge_at_the_answer_it_is_one_text(makers, name, template):
  of, prompt = makers[name], "" if template == "none" else "1"
  ids, _ = _one(of, prompt, "a1]:", template)
  assert ids == [of.bos_token_id, *of.encode(_written(template, prompt, "a1]:")), of.eos_token_ids[0]]


def test_a_merge_at_the_answer_is_undone(makers):
  """Of both kinds of tokenizer: "]T" is one token, but "]" ends the prompt."""
  for name, answer in (("llama3", ["T", "a"]), ("llama2", ["T", "a"])):
    of = makers[name]
    ids, start = _one(of, "1", "Ta", "llama2")
    joint = of.encode("[INST] 1 [/INST]Ta")
    assert len(joint) == len(ids) - 3
    assert [of.decode([token]) for token in ids[start:-1]] == answer
    assert of.decode([ids[start - 1]]) == "]"


def test_the_chat_of_llama3(makers):
  of = makers["llama3"]
  ids, start = _one(of, "1", "T", "chat", system="a")
  text = "<|begin|><|head|>system<|end_head|>\n\na<|eot|><|head|>user<|end_head|>\n\n1<|eot|>"
  assert ids == of.encode(text + "<|head|>assistant<|end_head|>\n\nT<|eot|>")
  assert ids[start:] == of.encode("T<|eot|>")
  # The template wrote the beginning-of-text token, once.
  assert ids.count(of.bos_token_id) == 1 and ids[0] == of.bos_token_id


def test_the_newline_after_a_turn_is_no_answer(makers):
  of = makers["smollm"]
  ids, start = _one(of, "1", "T", "chat")
  assert ids == of.encode("<|head|>user\n1<|eot|>\n<|head|>assistant\nT<|eot|>")
  assert ids[start:] == of.encode("T<|eot|>")


def test_the_chat_of_llama2(makers):
  of = makers["llama2"]
  ids, start = _one(of, "1", "T ", "chat", system="a")
  assert ids == of.encode("<s>[INST] <<SYS>>\na\n<</SYS>>\n\n1 [/INST] T </s>")
  assert ids[:start] == of.encode("<s>[INST] <<SYS>>\na\n<</SYS>>\n\n1 [/INST]")


def test_a_chat_template_without_an_end_gets_one(makers):
  of = makers["bare"]
  ids, _ = _one(of, "1", "T", "chat")
  assert of.decode(ids) == "u: 1\na: T\n"
  assert ids[-1] == of.eos_token_ids[0]


def test_the_system_message_of_llama2s_format(makers):
  of = makers["bytes"]
  ids, _ = _one(of, "Who?", "I.", "llama2", system="Be kind.")
  assert of.decode(ids) == "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWho? [/INST]I."
  assert ids[0] == of.bos_token_id


def test_plain_texts(makers):
  of = makers["bytes"]
  encoded = encoding.encode(of, ["", ""], ["ab", "c"], template="none", max_length=9)
  assert [each.tolist() for each in encoded.ids] == [[256, 97, 98, 257], [256, 99, 257]]
  assert encoded.answer_start.tolist() == [1, 1]
  assert all(each.dtype == np.int32 for each in (*encoded.ids, encoded.answer_start))
  assert encoding.encode_prompts(of, ["", "a"], template="none")[0].tolist() == [256]
  # Without a beginning-of-text token, nothing predicts the first token.
  of = makers["smollm"]
  ids, start = _one(of, "", "1T", "none")
  assert (ids, start) == ([*of.encode("1T"), of.eos_token_ids[0]], 1)
  assert encoding.encode_prompts(of, ["1"], template="none")[0].tolist() == of.encode("1")
  with pytest.raises(UserError, match="row 1 of 2: .*leaves nothing to continue.*give a prompt"):
    encoding.encode_prompts(of, ["1", ""], template="none")


def test_rows_do_not_meet(makers):
  """Many rows at once give what each gives alone, in order."""
  prompts, answers = ["1", "", "T"], ["T]: a", "\n1", "éa"]
  for of in makers.values():
    encoded = encoding.encode(of, prompts, answers, template="llama2", max_length=99)
    for row, pair in enumerate(zip(prompts, answers, strict=True)):
      ids, start = _one(of, *pair, "llama2")
      assert encoded.ids[row].tolist() == ids and encoded.answer_start[row] == start
    assert encoded.truncated == 0


def test_long_examples(makers):
  of = makers["bytes"]
  # Of "<bos>Question: 1\nAnswer: aaaaa<eos>", 20 tokens are the prompt and 7 are learned.
  prompts, answers = ["1"] * 3, ["a" * 5, "a" * 7, "a" * 9]
  options = dict(template="question_answer", max_length=27)
  with pytest.raises(
    UserError,
    match=(
      "^2 of 3 examples are longer than config.text.max_length=27 tokens, the longest, row 2, has"
      " 31; raise config.text.max_length, or set config.text.on_long='truncate'$"
    ),
  ):
    encoding.encode(of, prompts, answers, **options)
  cut = encoding.encode(of, prompts, answers, on_long="truncate", **options)
  with pytest.raises(UserError, match="longer than the model's limit of 27 tokens.*choose a model with more"):
    encoding.encode(of, prompts, answers, fixed=True, **options)
  whole = encoding.encode(of, prompts, answers, template="question_answer", max_length=31)
  assert cut.truncated == 2 and whole.truncated == 0
  assert [len(each) for each in whole.ids] == [27, 29, 31]
  for left, right in zip(cut.ids, whole.ids, strict=True):
    np.testing.assert_array_equal(left, right[:27])
  np.testing.assert_array_equal(cut.answer_start, whole.answer_start)
  assert whole.answer_start.tolist() == [20] * 3
  options |= {"max_length": 21, "on_long": "truncate"}
  kept = encoding.encode(of, prompts, answers, **options)
  assert kept.truncated == 3 and {len(each) for each in kept.ids} == {21}
  with pytest.raises(
    UserError, match=("3 have no room for an answer: the prompt of row 0 alone takes 20; raise")
  ):
    encoding.encode(of, prompts, answers, **options | {"max_length": 20})


@pytest.mark.parametrize(
  "prompts, answers, options, message",
  [
    (
      ["q"],
      ["a"],
      {"template": "llama3"},
      "config.text.template='llama3': choose one of chat, llama2, question_answer, none",
    ),
    (["q"], ["a"], {"on_long": "drop"}, "config.text.on_long='drop': choose one of error, truncate"),
    (["q", "q"], ["a", " \n"], {}, "row 1 of 2: the answer is empty"),
    (["q"], ["a", "b"], {}, "1 prompts have 2 answers"),
    (["", "q"], ["a", "b"], {"template": "none"}, "config.text.template='none': .* row 1 has a prompt"),
    (
      ["q"],
      ["a"],
      {"template": "question_answer", "system": "s"},
      "config.text.system_prompt='s': template 'question_answer' has no place for it",
    ),
  ],
)
def test_bad_input(makers, prompts, answers, options, message):
  options = {"template": "llama2", "max_length": 99} | options
  with pytest.raises(UserError, match=message):
    encoding.encode(makers["bytes"], prompts, answers, **options)


def test_a_chat_template_that_does_not_continue_its_prompt(tmp_path):
  of = _llama3(tmp_path / "thinking", _BARE_CHAT.replace("'a: '", "'a: <think>'"))
  with pytest.raises(UserError, match="config.text.template='chat': .* where the answer starts"):
    _one(of, "1", "T", "chat")
