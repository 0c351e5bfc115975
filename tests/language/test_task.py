"""What steps of a language model compute, against unpacked texts and PEFT, however it is laid out."""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hamu_jax import data
from hamu_jax.config import default as config_lib
from hamu_jax.config import validation
from hamu_jax.config.hyperparameters import hyperparameters_of
from hamu_jax.config.language_paper import language_config
from hamu_jax.data import packing
from hamu_jax.data.encoding import Encoded
from hamu_jax.engine import chunk as chunk_lib
from hamu_jax.engine import loop, methods, pairing, placement, sub_step
from hamu_jax.engine import role_gradient as role_gradient_lib
from hamu_jax.engine import stage as stage_lib
from hamu_jax.engine import step as step_lib
from hamu_jax.engine.train_state import create_state
from hamu_jax.experiment import stage_plan
from hamu_jax.language import adapter as adapter_lib
from hamu_jax.language import feed as packed
from hamu_jax.language import task as language
from hamu_jax.models import llama, llama_config, lora
from hamu_jax.paired import Paired
from hamu_jax.run import preemption, rundir

CONFIG = llama_config.LlamaConfig(
  vocab_size=43,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=4,
  max_position_embeddings=64,
)
MODEL = llama.Llama(CONFIG)
LORA = lora.LoraConfig(rank=2, alpha=3.0)
BETA = 0.7
SETTINGS = {"preference_beta": BETA, "margin": 0.0, "steering": 1.7}
# The first six texts are to be retained, the others to be forgotten.
SPLIT = Paired(np.arange(6, dtype=np.int32), np.arange(6, 12, dtype=np.int32))


class UnlearningRequest(NamedTuple):
  """Twelve texts and their alternatives, a model far from uniform, and two of its adapters."""

  texts: packing.TextData
  base: Any
  adapter: Any
  original: Any


def encoded(rng):
  lengths = rng.integers(3, 12, 12)
  ids = tuple(rng.integers(1, CONFIG.vocab_size, length).astype(np.int32) for length in lengths)
  return Encoded(ids, rng.integers(1, lengths).astype(np.int32), 0)


@pytest.fixture(scope="module")
def case():
  rng = np.random.default_rng(0)
  base = MODEL.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  base = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf if path[-1].key == "scale" else 8 * leaf, base
  )

  def adapter():
    new = lora.unstack(lora.init(jax.random.key(0), LORA, base))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype), new)

  texts = packing.TextData(encoded(rng), encoded(rng), np.arange(12) >= 6)
  return UnlearningRequest(texts, base, adapter(), adapter())


class Layout(NamedTuple):
  """How a batch is laid out: length of rows, rows of a piece, order of texts, rows of padding between."""

  row_length: int
  piece: int
  reverse: bool = False
  gaps: bool = False


LAYOUTS = {
  "a text and its alternative a row": Layout(23, 1),
  "two rows a piece, in another order, with padding between": Layout(40, 2, reverse=True, gaps=True),
  "all in one row, more than it needs": Layout(170, 0),
}
BATCH = np.array([6, 11, 8, 7, 10], np.int32)


@functools.cache
def role_program(terms, dropout, piece):
  """`role_gradient.role_gradient` of these terms, compiled."""
  forward = adapter_lib.make_forward(MODEL, lora.LoraConfig(LORA.rank, LORA.alpha, dropout), hidden_layer=0)
  return jax.jit(
    role_gradient_lib.role_gradient(forward, adapter_lib.fetch, terms, train=True, microbatch=piece)
  )


def role_sums(case, layout, coefficients, *, dropout=0.0, key=0):
  """`RoleSums` of the batch."""
  batch = BATCH[::-1] if layout.reverse else BATCH
  packer = packing.Packer(case.texts)
  shape = packer.shape([batch], layout.row_length, 1)
  if layout.gaps:
    shape = shape._replace(predictions=shape.predictions + 8, slots=shape.slots + 3)
  window = jax.tree.map(jnp.asarray, packer.pack(batch, shape))
  places = np.arange(len(window.token), dtype=np.int32)
  if layout.gaps:
    places = np.stack([places, np.full_like(places, -1)], axis=1).reshape(-1)[::-1]
  key = jax.random.key(key)
  inputs = role_gradient_lib.Inputs(
    {"base": case.base}, variables_of(case.original), window, key, key, SETTINGS
  )
  return role_program(tuple(sorted(coefficients)), dropout, layout.piece)(
    variables_of(case.adapter), inputs, jnp.asarray(places), jax.tree.map(jnp.asarray, coefficients)
  )


def variables_of(adapter):
  return {"params": adapter, "batch_stats": {}}


def unpacked(case, coefficients):
  """The same of a text a row and no adapter beside the weights: (gradient, {term: sum}, count)."""
  texts = case.texts

  def run(params, kind):
    """(log p of the answers' tokens and 0 elsewhere, all log p, states, whether an answer) before each."""
    ids = [kind.ids[row] for row in BATCH]
    token = np.stack([np.pad(each, (0, 12 - len(each))) for each in ids])
    place, length = np.arange(1, 12)[None], np.array([[len(each)] for each in ids])
    answer = (place >= kind.answer_start[BATCH][:, None]) & (place < length)
    logits, recorded = MODEL.apply({"params": params}, jnp.asarray(token), mutable=["intermediates"])
    log_p = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_p, token[:, 1:, None], axis=2)[..., 0]
    states = recorded["intermediates"]["layers"]["hidden"][0][0, :, :-1]
    return jnp.where(answer, picked, 0), log_p, states, answer

  def merged(adapter):
    return lora.merge(case.base, lora.stack(adapter), LORA)

  def terms(adapter):
    params, original = merged(adapter), merged(case.original)
    picked, log_p, states, answer = run(params, texts.examples)
    picked0, log_p0, states0, _ = run(original, texts.examples)
    lose = jnp.sum(picked - picked0, axis=1)
    other, other0 = (run(each, texts.alternatives)[0] for each in (params, original))
    win = jnp.sum(other - other0, axis=1)
    distance = jnp.mean((states - states0) ** 2, axis=-1)
    divergence = jnp.sum(jnp.exp(log_p0) * (log_p0 - log_p), axis=-1)
    all_terms = {
      "kl": (jnp.sum(jnp.where(answer, divergence, 0)), answer.sum()),
      "alternative": (
        -jnp.sum(other),
        np.sum([len(texts.alternatives.ids[row]) - texts.alternatives.answer_start[row] for row in BATCH]),
      ),
      "hidden": (jnp.sum(jnp.where(answer, distance, 0)), answer.sum()),
      "dpo": (jnp.sum(-2 / BETA * jax.nn.log_sigmoid(BETA * (win - lose))), len(BATCH)),
    }
    chosen = {name: all_terms[name] for name in coefficients}
    return sum(coefficients[name] * total for name, (total, _) in chosen.items()), chosen

  gradient, chosen = jax.jit(jax.grad(terms, has_aux=True))(case.adapter)
  return gradient, chosen


def assert_close(got, wanted, **tolerances):
  tolerances = {"rtol": 1e-5, "atol": 1e-5} | tolerances
  for (path, leaf), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(leaf, other, err_msg=jax.tree_util.keystr(path), **tolerances)


@pytest.mark.parametrize(
  "coefficients",
  [
    {"kl": 0.8, "hidden": -0.4},
    {"dpo": 1.3},
    pytest.param({"alternative": 1.0}, marks=pytest.mark.slow),
  ],
  ids=lambda coefficients: "-".join(coefficients),
)
def test_a_role_depends_on_its_texts_alone(case, coefficients):
  gradient, wanted = unpacked(case, coefficients)
  scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
  assert scale > 0.1
  for name, layout in LAYOUTS.items():
    sums = role_sums(case, layout, coefficients)
    assert_close(sums.gradient, gradient, rtol=1e-4, atol=1e-5 * scale)
    for term, (total, count) in wanted.items():
      np.testing.assert_allclose(sums.values[term].total, total, rtol=1e-5, err_msg=name)
      assert sums.values[term].count == sums.count == count


def test_dropout_depends_on_the_text_and_the_step_alone(case):
  layout, other_layout, _ = LAYOUTS.values()
  first, other = (role_sums(case, each, {"dpo": 1.0}, dropout=0.4) for each in (layout, other_layout))
  assert_close(other.gradient, first.gradient, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(other.values["dpo"].total, first.values["dpo"].total, rtol=1e-5)
  for other in (
    role_sums(case, layout, {"dpo": 1.0}, dropout=0.4, key=1),
    role_sums(case, layout, {"dpo": 1.0}),
  ):
    assert abs(other.values["dpo"].total / first.values["dpo"].total - 1) > 1e-3


def test_the_original_model_never_drops_out(case):
  layout, terms = LAYOUTS["a text and its alternative a row"], {"kl": 1.0, "hidden": 1.0}
  # Where only its adapter does anything, dropout changes nothing.
  nothing = case._replace(adapter=jax.tree.map(jnp.zeros_like, case.adapter))
  dropped, whole = (role_sums(nothing, layout, terms, dropout=dropout) for dropout in (0.4, 0.0))
  assert whole.values["kl"].total > 1 and whole.values["hidden"].total > 0.1
  for name in ("kl", "hidden", "ce"):
    np.testing.assert_allclose(dropped.values[name], whole.values[name], rtol=1e-5)
  # The model does drop out, so that it is not the original even where it has its adapter.
  same = case._replace(original=case.adapter)
  dropped, whole = (role_sums(same, layout, terms, dropout=dropout) for dropout in (0.4, 0.0))
  for name in terms:
    assert dropped.values[name].total > 1e-2
    np.testing.assert_allclose(whole.values[name].total, 0, atol=1e-6)


@pytest.mark.parametrize("row_length, piece", [(24, 1), (40, 2), (56, 0)])
@pytest.mark.parametrize("shape", ["gqa_tied", "llama2_like", "llama3_scaled"])
def test_losses_and_gradients_are_pefts(golden, read_llama, shape, row_length, piece):
  case = read_llama(shape, golden)
  expected = case.expected
  lengths = expected["attention_mask"].sum(1)
  ids = tuple(row[:length] for row, length in zip(expected["input_ids"], lengths, strict=True))
  start = np.argmax(expected["labels"] >= 0, axis=1)
  packer = packing.Packer(packing.TextData(Encoded(ids, start, 0), None, np.zeros(3, bool)))
  batch = np.array([2, 0, 1], np.int32)
  window = packer.pack(batch, packer.shape([batch], row_length, 1))
  role = role_gradient_lib.role_gradient(
    adapter_lib.make_forward(case.model, case.lora), adapter_lib.fetch, ("ce",), train=True, microbatch=piece
  )
  key = jax.random.key(0)
  inputs = role_gradient_lib.Inputs(
    {"base": case.params}, {}, jax.tree.map(jnp.asarray, window), key, key, {}
  )
  sums = jax.jit(role)(
    {"params": lora.unstack(case.adapter), "batch_stats": {}},
    inputs,
    jnp.arange(len(window.token)),
    {"ce": jnp.asarray(1.0)},
  )
  np.testing.assert_allclose(sums.values["ce"].total / sums.count, expected["lora_loss"], rtol=0, atol=2e-4)
  gradient = lora.stack(sums.gradient)["layers"]
  names = [name for name in expected if name.startswith("grad/")]
  assert len(names) == 4
  for name in names:
    layer, part, projection, factor = name.split(".")[4:8]
    ours = gradient[part][projection][factor][int(layer)] / sums.count
    # A hundredth of the largest is far above what they differ by.
    assert np.max(np.abs(expected[name])) > 1e-4
    np.testing.assert_allclose(ours.T, expected[name], rtol=0, atol=2e-6)


def test_padding_predicts_nothing(case):
  packer = packing.Packer(case.texts)
  shape = packer.shape([BATCH], 40, 1)
  window = jax.tree.map(jnp.asarray, packer.pack(BATCH, shape))
  batch = adapter_lib.fetch(window, jnp.asarray([1, -1, 0]), jax.random.key(0))
  for name in ("mask", "alternative_mask", "example_mask"):
    np.testing.assert_array_equal(batch[name][1], np.zeros(batch[name].shape[1]))
    np.testing.assert_array_equal(batch[name][0], getattr(window, name)[1])
    np.testing.assert_array_equal(batch[name][2], getattr(window, name)[0])
  # Numbers of predictions, not of examples, as everywhere where there is one row a prediction.
  assert batch["index"].shape == batch["label"].shape == batch["forget"].shape
  np.testing.assert_array_equal(batch["index"][0], window.prediction_row[1])


def run_steps(case, name, kind, devices, *, dropout, count=2):
  """-> (parameters, metrics) after some steps of a method."""
  options = config_lib.default_config().method
  options.update(name=name, clip_norm=0.0, on_infeasible="project", constraint_ratio=0.1)
  options.optimizer.learning_rate = 0.05
  method = methods.METHODS[name]
  mesh = None
  if kind == "pmap":
    mesh = pairing.make_mesh(jax.devices()[:devices], method.device_groups)
  program = step_lib.make_step(
    method,
    options,
    forward=adapter_lib.make_forward(MODEL, lora.LoraConfig(LORA.rank, LORA.alpha, dropout)),
    fetch=adapter_lib.fetch,
    pairing=kind,
    train=True,
    schedule=optax.constant_schedule(1.0),
    microbatch=1,
  )
  hyperparameters = hyperparameters_of(options, method)
  chunk = chunk_lib.compile_target(chunk_lib.make_chunk(program.step), mesh, method.roles)
  variables = variables_of(case.adapter)
  state = create_state(variables, program.optimizers(hyperparameters), seed=0)
  plan = data.unlearning_plan(SPLIT, "paired", batch_size=4, seed=0)
  texts = packed.PackedTexts(case.texts, 0, 1)
  texts.prepare(plan, count)
  window, batches = texts.chunk(plan, 0, count, mesh)
  frozen = sub_step.Frozen(variables, None, {"base": case.base})
  state, frozen = placement.place((state, frozen), mesh)
  state, metrics, done = jax.device_get(
    chunk(state, frozen, window, batches, jnp.int32(count), hyperparameters)
  )
  assert done == count and state.stop == 0
  return state.params, {name: values[:count] for name, values in metrics.items()}


@pytest.mark.parametrize("kind", ["pmap", pytest.param("vmap", marks=pytest.mark.slow)])
def test_dropout_is_the_same_whatever_the_pairing(case, kind):
  wanted, metrics = run_steps(case, "gdiff", "sequential", 1, dropout=0.3)
  moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), wanted, case.adapter)
  assert max(jax.tree.leaves(moved)) > 1e-2
  params, other = run_steps(case, "gdiff", kind, 4, dropout=0.3)
  assert_close(params, wanted, rtol=1e-4)
  for name in ("retain_loss", "forget_loss", "forget_grad_norm"):
    np.testing.assert_allclose(other[name], metrics[name], rtol=1e-4, err_msg=name)


def test_the_first_step_is_at_the_original(case):
  _, metrics = run_steps(case, "scrub", "sequential", 1, dropout=0.0)
  for kl in ("retain_kl", "forget_kl"):
    np.testing.assert_allclose(metrics[kl][0], 0, atol=1e-6)
    assert metrics[kl][1] > 1e-5
  # There it has no gradient either; without the retain loss nothing would move.
  assert metrics["forget_grad_norm"][0] < 1e-4 < metrics["retain_grad_norm"][0]


@contextlib.contextmanager
def silent(stage, total, initial, **options):
  del stage, total, initial

  class Bar:
    def phase(self, name):
      del name

    def update(self, step, values):
      pass

  yield Bar()


def authors_config(name):
  """A tiny random model on a few invented authors, to unlearn by a method."""
  config = language_config()
  config.data.source = "authors"
  config.text.update(retain_size=9, forget_size=5)
  config.method.update(name=name, batch_size=5, max_steps=2, layer=1, clip_norm=0.0)
  config.method.optimizer.learning_rate = 0.1
  config.train.batch_size = 8
  return config


KEYS = {
  # What changes nothing that is computed, or nothing that is learnt.
  "rematerialization": ("dpo", {"language": {"rematerialization": "full"}}, set()),
  "unseen texts": ("dpo", {"text": {"test_split": "test"}}, set()),
  "refusals that are not read": ("npo", {"text": {"refusals": ("No.",)}}, set()),
  "refusals": ("dpo", {"text": {"refusals": ("No.",)}}, {"unlearn"}),
  "the method": ("dpo", {"method": {"preference_beta": 0.2}}, {"unlearn"}),
  "the forget set": ("dpo", {"text": {"forget_size": 6}}, {"pretrain", "retrain", "unlearn"}),
  "the adapter": ("dpo", {"language": {"lora": {"rank": 4}}}, {"pretrain", "retrain", "unlearn"}),
  "the prompt": ("dpo", {"text": {"template": "llama2"}}, {"pretrain", "retrain", "unlearn"}),
  "the seed": ("dpo", {"seed": 7}, {"pretrain", "retrain", "unlearn"}),
}


def keys_of(config):
  task = language.Language(config)
  return stage_plan.make_plan(config, task, task.request.indices, devices=1).keys, task


@pytest.mark.parametrize("method, change, expected", KEYS.values(), ids=KEYS)
def test_a_stage_is_run_again_if_and_only_if_it_would_be_another(method, change, expected):
  before, task = keys_of(authors_config(method))
  config = authors_config(method)
  config.update(change)
  after, changed = keys_of(config)
  assert {name for name in before if before[name] != after[name]} - {"mask"} == expected
  # Evaluations go by all texts.
  assert (task.evaluation_inputs == changed.evaluation_inputs) == (
    not {"test_split", "forget_size"} & set(change.get("text", ()))
  )


def test_cut_texts_are_counted():
  config = authors_config("npo")
  assert language.Language(config).provenance["cut"] == {}
  whole = [len(ids) for ids in language.Language(config)._encoded["retain"].ids]
  config.text.update(on_long="truncate", max_length=int(np.median(whole)))
  task = language.Language(config)
  assert task.provenance["cut"]["retain"] == sum(length > np.median(whole) for length in whole)
  assert max(len(ids) for ids in task._encoded["retain"].ids) == int(np.median(whole))


def run_stage(tmp_path, name, kind, **mesh):
  """-> (task, variables it started from, outcome, metrics) of two steps of an experiment's own stage."""
  config = authors_config(name)
  config.language.rematerialization = "full"
  config.pairing = kind
  config.mesh.update(mesh)
  validation.validate(config)
  task = language.Language(config)
  devices = jax.devices() if kind == "pmap" else jax.devices()[:1]
  stages = stage_plan.make_plan(config, task, task.request.split(None), devices=len(devices)).stages
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 8, leaf.dtype), task.template
  )
  folder = tmp_path / kind
  folder.mkdir()
  with preemption.Watch() as watch:
    runner = loop.Loop(
      forward=task.forward(kind),
      fetch=task.fetch,
      feed=task.feed(task.request.indices),
      evaluate=lambda variables: {},
      pairing=kind,
      devices=devices,
      progress=silent,
      watch=watch,
      checkpoint_seconds=1e9,
      base=task.base,
      weights=config.mesh.weights,
    )
    frozen = sub_step.Frozen(variables)
    member = stage_lib.Member(stages["unlearn"], variables, frozen, rundir.RunDir(folder))
    (outcome,) = runner.run([member], folder / "checkpoints")
  rows = [row for row in rundir.read_metrics(folder).rows if row["split"] == "step"]
  return task, variables, outcome, rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rmu", "dpo_kl"])
def test_devices_that_share_weights_compute_the_same(tmp_path, name):
  _, before, wanted, rows = run_stage(tmp_path, name, "sequential")
  task, _, got, other = run_stage(tmp_path, name, "pmap", weights=2)
  moved = jax.tree.map(
    lambda a, b: float(jnp.max(jnp.abs(a - b))), wanted.variables["params"], before["params"]
  )
  assert max(jax.tree.leaves(moved)) > 1e-4
  assert got.steps == wanted.steps == len(rows) == 2
  assert_close(jax.device_get(got.variables), jax.device_get(wanted.variables), rtol=1e-3)
  for mine, theirs in zip(other, rows, strict=True):
    for key, value in theirs.items():
      if isinstance(value, float):
        np.testing.assert_allclose(mine[key], value, rtol=1e-3, atol=1e-6, err_msg=key)
  mesh = pairing.make_mesh(jax.devices(), 2, 2)
  kernel = task.base(mesh)["base"]["layers"]["mlp"]["up_proj"]["kernel"]
  assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 2}
