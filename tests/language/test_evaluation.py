"""Evaluation of a language model against NumPy on its logits, whatever the batches and devices."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from hamu_jax.data.encoding import Encoded
from hamu_jax.data.text_reader import TextSplit
from hamu_jax.errors import UserError
from hamu_jax.language import evaluation, prediction
from hamu_jax.metrics import tofu
from hamu_jax.models import llama, llama_config, lora, sharding

_CONFIG = llama_config.LlamaConfig(
  vocab_size=67,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  max_position_embeddings=96,
  eos_token_ids=(2,),
)
_WRONG = 3
_SIZES = {"retain": 11, "forget": 6, "test": 7}


class _Tokenizer:
  """Each token is a word; tokens below 3 are special, and 2 ends a text."""

  eos_token_ids = (2,)

  def decode_batch(self, rows):
    return [" ".join(f"w{i}" for i in ids if i >= 3) for ids in rows]


def _encoded(rng, prompts, longest):
  """The prompts with random answers of 1 to `longest` tokens and the end."""
  answers = [rng.integers(3, 67, rng.integers(1, longest + 1)) for _ in prompts]
  ids = tuple(
    np.concatenate([prompt, answer, [2]]).astype(np.int32)
    for prompt, answer in zip(prompts, answers, strict=True)
  )
  starts = np.array([len(prompt) for prompt in prompts], np.int32)
  return Encoded(ids, starts, 0)


def _questions(rng, size, perturbed=_WRONG, paraphrased=True):
  """Every other one of twice as many random questions, last first."""
  prompts = [rng.integers(3, 67, rng.integers(1, 20)) for _ in range(2 * size)]
  answers = _encoded(rng, prompts, 25)
  decode = _Tokenizer().decode_batch
  texts = TextSplit(
    decode(prompts), decode(ids[start:] for ids, start in zip(*answers[:2], strict=True)), None, None, None
  )
  return evaluation.Questions(
    texts,
    answers,
    np.arange(2 * size)[::-2],
    _encoded(rng, prompts, 9) if paraphrased else None,
    tuple(_encoded(rng, prompts, 9) for _ in range(perturbed)),
  )


@pytest.fixture(scope="module")
def case():
  """(apply, base, adapter, splits, logits): logits is the plain model's, by token numbers."""
  model = llama.Llama(_CONFIG)
  params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  # Far from uniform predictions.
  params = jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, params)
  spec = lora.LoraConfig(rank=3, alpha=6)
  adapter = jax.tree.map(
    lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape) / 8,
    lora.unstack(lora.init(jax.random.key(1), spec, params)),
  )

  def apply(variables, *args, **kwargs):
    merged = {"params": variables["base"]}
    if variables["params"]:
      merged["lora"] = lora.stack(variables["params"])
    return lora.with_lora(model.apply, spec)(merged, *args, **kwargs)

  merged = lora.merge(params, lora.stack(adapter), spec)
  plain = jax.jit(lambda tokens: model.apply({"params": merged}, tokens))

  def logits(ids):
    padded = np.zeros((1, _CONFIG.max_position_embeddings), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(plain(padded)[0, : len(ids)], np.float64)

  rng = np.random.default_rng(0)
  splits = {name: _questions(rng, size) for name, size in _SIZES.items()}
  return apply, {"base": params}, {"params": adapter}, splits, logits


def _evaluator(case, splits=None, devices=None, **options):
  apply, base, _, own_splits, _ = case
  options = {"tokenizer": _Tokenizer(), "new_tokens": 5, "fraction": 0.2} | options
  if devices:
    # Rows and weights are split alike, as where a device cannot hold the model.
    options["mesh"] = mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    base = jax.device_put(base, {"base": sharding.base_shardings(base["base"], mesh, "data")})
  return evaluation.Evaluator(apply, _CONFIG, base, splits or own_splits, **options)


@pytest.fixture(scope="module")
def evaluator(case):
  """Of few batches."""
  return _evaluator(case)


def _brute(logits, ids, start):
  """The numbers of one answer."""
  log_p = scipy.special.log_softmax(logits(ids)[start - 1 : -1], axis=1)
  tokens = ids[start:]
  picked = log_p[np.arange(len(tokens)), tokens]
  means = np.sum(np.exp(log_p) * log_p, axis=1)
  deviations = np.sqrt(np.sum(np.exp(log_p) * (log_p - means[:, None]) ** 2, axis=1))
  lowest = max(1, len(tokens) // 5)
  return {
    "loss": -picked.mean(),
    "probability": np.exp(picked.mean()),
    "token_probability": np.exp(picked).mean(),
    "accuracy": np.mean(log_p.argmax(axis=1) == tokens),
    "entropy": -means.mean(),
    "tokens": len(tokens),
    "min_k": np.sort(picked)[:lowest].mean(),
    "min_k_plus_plus": np.sort((picked - means) / deviations)[:lowest].mean(),
  }


@pytest.fixture(scope="module")
def expected(case):
  """`per_example` by NumPy."""
  *_, splits, logits = case
  result = {}
  for name, questions in splits.items():
    rows = [
      _brute(logits, questions.answers.ids[row], questions.answers.answer_start[row])
      for row in questions.indices
    ]
    values = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    sizes = [len(zlib.compress(questions.texts.answers[row].encode())) for row in questions.indices]
    result[name] = values | {"zlib": values["loss"] / np.array(sizes)}
  return result


@pytest.mark.parametrize(
  "batch_tokens, devices, predictions", [(1, None, 1024), (200, None, 1024), (512, None, 7), (600, 2, 16)]
)
def test_every_answer_whatever_the_batches(
  case, evaluator, expected, monkeypatch, batch_tokens, devices, predictions
):
  large = evaluator.per_example(case[2])
  monkeypatch.setattr(prediction, "_PREDICTIONS", predictions)
  found = _evaluator(case, devices=devices, batch_tokens=batch_tokens).per_example(case[2])
  assert list(found) == list(_SIZES)
  for name, values in found.items():
    assert values.keys() == expected[name].keys()
    for key, value in values.items():
      np.testing.assert_allclose(value, large[name][key], rtol=1e-5, atol=1e-5, err_msg=key)
      np.testing.assert_allclose(value, expected[name][key], rtol=1e-4, atol=1e-5, err_msg=key)


def test_means_and_aucs(case, evaluator, expected):
  summary = evaluator.summary(case[2])
  for name, size in _SIZES.items():
    assert summary[name].pop("count") == size
    assert set(summary[name]) == {"accuracy", "loss", "entropy", "probability", "token_probability"}
    for key, value in summary[name].items():
      np.testing.assert_allclose(value, expected[name][key].mean(), rtol=1e-4)
  aucs = {key: value for key, value in summary.items() if key not in _SIZES}
  for name, value in aucs.items():
    first, second, *kind = name.removesuffix("_auc").split("_")
    low, high = (expected[split]["_".join(kind) or "loss"] for split in (first, second))
    wanted = roc_auc_score(np.repeat([0, 1], [len(low), len(high)]), np.concatenate([low, high]))
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
  # A model that knows an answer has lower losses and higher scores on it.
  assert set(aucs) == {
    "retain_forget_auc",
    "forget_test_auc",
    "retain_forget_zlib_auc",
    "forget_test_zlib_auc",
    "forget_retain_min_k_auc",
    "test_forget_min_k_auc",
    "forget_retain_min_k_plus_plus_auc",
    "test_forget_min_k_plus_plus_auc",
  }


def test_without_a_test_split(case):
  splits = {name: case[3][name] for name in ("retain", "forget")}
  summary = _evaluator(case, splits).summary(case[2])
  assert "retain_forget_auc" in summary and "forget_retain_min_k_auc" in summary
  assert not any("test" in name for name in summary)


def test_without_an_adapter_it_is_the_base_model(case, evaluator):
  apply, base, _, splits, _ = case
  found = evaluator.per_example({"params": {}})["forget"]["loss"]
  row = splits["forget"].indices[0]
  ids, start = splits["forget"].answers.ids[row], splits["forget"].answers.answer_start[row]
  logits = jax.jit(llama.Llama(_CONFIG).apply)({"params": base["base"]}, ids[None])[0]
  np.testing.assert_allclose(found[0], _brute(lambda _: logits, ids, start)["loss"], rtol=1e-4)


def test_one_compilation_a_width(case):
  evaluator = _evaluator(case, batch_tokens=300)
  for _ in range(2):
    evaluator.summary(case[2])
  lengths = [len(split.answers.ids[row]) for split in case[3].values() for row in split.indices]
  widths = np.unique(np.searchsorted([16, 24, 32, 48], lengths))
  assert evaluator._predictor._predict._cache_size() == len(widths)


@pytest.mark.parametrize("shape", ["gqa_tied", "llama2_like"])
def test_losses_as_transformers_and_peft_compute_them(golden, read_llama, shape):
  case = read_llama(shape, golden)
  stored = case.expected
  lengths = stored["attention_mask"].sum(axis=1)
  ids = tuple(row[:length] for row, length in zip(stored["input_ids"], lengths, strict=True))
  starts = np.argmax(stored["labels"] >= 0, axis=1)
  texts = TextSplit(("",) * 3, ("a",) * 3, None, None, None)
  evaluator = evaluation.Evaluator(
    lora.with_lora(case.model.apply, case.lora),
    case.config,
    {"params": case.params},
    {"forget": evaluation.Questions(texts, Encoded(ids, starts, 0), np.arange(3))},
    tokenizer=_Tokenizer(),
  )
  for variables, key in (({}, "loss"), ({"lora": case.adapter}, "lora_loss")):
    values = evaluator.per_example(variables)["forget"]
    # Theirs weighs every token the same.
    loss = np.average(values["loss"], weights=values["tokens"])
    np.testing.assert_allclose(loss, stored[key], rtol=0, atol=2e-4)


def _continue(logits, prompt, most):
  """Greedy tokens one by one, without a cache, until the end or `most`."""
  ids = list(prompt)
  for _ in range(most):
    token = int(np.argmax(logits(ids)[-1]))
    if token == 2:
      break
    ids.append(token)
  return ids[len(prompt) :]


@pytest.mark.parametrize("batch_tokens, devices", [(1, None), (120, None), (8192, 2)])
def test_generation_is_token_by_token(case, batch_tokens, devices):
  *_, variables, splits, logits = case
  evaluator = _evaluator(case, devices=devices, batch_tokens=batch_tokens)
  answers = splits["forget"].answers
  wanted = _Tokenizer().decode_batch(
    _continue(logits, answers.ids[row][: answers.answer_start[row]], 5) for row in splits["forget"].indices
  )
  assert evaluator.generate(variables, "forget") == wanted


def test_the_end_of_an_answer_is_not_in_it(case):
  *_, variables, splits, logits = case
  answers, row = splits["forget"].answers, splits["forget"].indices[0]
  first, second, *_ = _continue(logits, answers.ids[row][: answers.answer_start[row]], 5)
  assert first != second
  generated = _evaluator(case, eos_token_ids=(second,)).generate(variables, "forget")
  assert generated[0] == f"w{first}"


@pytest.fixture(scope="module")
def suite(case):
  rng = np.random.default_rng(1)
  splits = {name: case[3][name] for name in ("retain", "forget")} | {
    "real_authors": _questions(rng, 3, paraphrased=False),
    "world_facts": _questions(rng, 4, paraphrased=False),
    "test": _questions(rng, 2, perturbed=0, paraphrased=False),
  }
  return splits, *_evaluator(case, splits).suite(case[2])


def _losses(logits, questions, encoded):
  return np.array(
    [_brute(logits, encoded.ids[row], encoded.answer_start[row])["loss"] for row in questions.indices]
  )


def test_scores_of_the_suite(case, suite):
  *_, logits = case
  splits, values, records = suite
  means = {}
  for name, questions in splits.items():
    right = _losses(logits, questions, questions.answers)
    reworded = _losses(logits, questions, questions.paraphrased or questions.answers)
    wrong = [_losses(logits, questions, encoded) for encoded in questions.perturbed]
    record = records[name]
    np.testing.assert_allclose(record["avg_gt_loss"], right, rtol=1e-4)
    np.testing.assert_allclose(record["avg_paraphrased_loss"], reworded, rtol=1e-4)
    scores = {"rouge": tofu.rouge(record["generated"], record["answer"])["rougeL_recall"]}
    chances = np.exp(-np.stack([right, *wrong]))
    multiple_choice = name in ("real_authors", "world_facts")
    scores["probability"] = chances[0] / chances.sum(axis=0) if multiple_choice else chances[0]
    if wrong:
      ratio = np.exp(reworded - np.mean(wrong, axis=0))
      np.testing.assert_allclose(record["truth_ratio"], ratio, rtol=1e-4)
      scores["truth_ratio"] = np.minimum(ratio, 1 / ratio) if name == "forget" else np.maximum(0, 1 - ratio)
    assert values[name].keys() == scores.keys()
    for key, score in scores.items():
      np.testing.assert_allclose(record[f"{key}_score"], score, rtol=1e-4, atol=1e-7)
      np.testing.assert_allclose(values[name][key], score.mean(), rtol=1e-4, atol=1e-7)
    means[name] = [score.mean() for score in scores.values()]
  nine = np.array([means[name] for name in ("retain", "real_authors", "world_facts")])
  with np.errstate(divide="ignore"):
    np.testing.assert_allclose(values["model_utility"], 9 / np.sum(1 / nine), rtol=1e-4)
  assert set(values) == {*splits, "model_utility"}


def test_records_of_the_suite(case, suite):
  splits, _, records = suite
  for name, questions in splits.items():
    record = records[name]
    np.testing.assert_array_equal(record["row"], questions.indices)
    assert record["question"] == [questions.texts.prompts[row] for row in questions.indices]
    assert record["answer"] == [questions.texts.answers[row] for row in questions.indices]
    assert all(len(value) == len(questions.indices) for value in record.values())
  # Between two models, as TOFU asks for it.
  _, original = _evaluator(case, {"forget": splits["forget"]}).suite({"params": {}})
  ratios = (records["forget"]["truth_ratio"], original["forget"]["truth_ratio"])
  assert tofu.forget_quality(*ratios) == pytest.approx(ks_2samp(*ratios).pvalue)


def test_model_utility_needs_all_of_its_inputs(case):
  rng = np.random.default_rng(2)
  splits = {
    "retain": _questions(rng, 1, perturbed=0),
    "real_authors": _questions(rng, 1),
    "world_facts": _questions(rng, 1),
  }
  values, records = _evaluator(case, splits).suite(case[2])
  assert "model_utility" not in values
  assert values["retain"].keys() == {"rouge", "probability"}
  assert "average_perturb_loss" not in records["retain"]


def test_texts_without_questions_are_read_only(case):
  questions = _questions(np.random.default_rng(3), 2, perturbed=0)
  questions = questions._replace(texts=questions.texts._replace(prompts=("",) * 4))
  values, records = _evaluator(case, {"retain": questions}).suite(case[2])
  assert values["retain"].keys() == {"probability"}
  assert "generated" not in records["retain"]


def _question(ids, start):
  """Two questions of which the second, evaluated, is this."""
  encoded = Encoded((np.array([3, 4]), np.array(ids)), np.array([1, start]), 0)
  texts = TextSplit(("a", "b"), ("c", "d"), None, None, None)
  return evaluation.Questions(texts, encoded, np.array([1]))


@pytest.mark.parametrize(
  "questions, message",
  [
    (_question([3, 4], 2), "split forget, row 1: its answer begins at token 2 of 2; a text needs"),
    (_question([3, 4], 0), "row 1: its answer begins at token 0 of 2"),
    (_question([3, 67], 1), "row 1: token 67 is none of the model's 67"),
    (_question([3] * 97, 1), "row 1: 97 tokens exceed the model's context of 96"),
    (_question([3, 4], 1)._replace(indices=np.array([], int)), "split forget has no questions"),
    (
      _question([3, 4], 1)._replace(perturbed=(Encoded((), np.array([]), 0),)),
      "split forget has 2 answers and 0 other ones",
    ),
  ],
)
def test_splits_that_cannot_be_evaluated(case, questions, message):
  with pytest.raises(UserError, match=message):
    _evaluator(case, {"forget": questions})


def test_a_prompt_may_fill_the_context_but_for_the_answer(case):
  evaluator = _evaluator(case, {"forget": _question([3] * 92, 91)})
  assert len(evaluator.generate(case[2], "forget")) == 1
  evaluator = _evaluator(case, {"forget": _question([3] * 93, 92)})
  with pytest.raises(UserError, match="prompts of 92 tokens and 5 new ones exceed"):
    evaluator.generate(case[2], "forget")
