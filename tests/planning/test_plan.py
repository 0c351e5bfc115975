"""What a plan says of small programs of known size, and of a whole experiment's step."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hamu_jax.config import language_paper as language_config
from hamu_jax.config import validation
from hamu_jax.errors import UserError
from hamu_jax.models import llama_config
from hamu_jax.planning import hlo, plan
from hamu_jax.planning import language as language_plan
from hamu_jax.run import tables
from tests.arguments import replaced

ROOT = pathlib.Path(__file__).parent.parent.parent
TINY = llama_config.PRESETS["tiny"]
SMOKE = [
  "hamu_jax.plan",
  "--config=configs/tofu_smollm2_hamu.py:smoke",
  "--topology=v5e:2x2",
  "--config.pairing=pmap",
  "--config.mesh.weights=2",
  "--config.language.rematerialization=full",
  "--config.language.path=",
  "--config.method.batch_size=4",
]


@pytest.fixture
def target(monkeypatch):
  """Simulated devices, whether libtpu is here or not."""
  monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
  return plan.find_target("v5e:2x2")


def test_analyse(target):
  mesh = jax.sharding.Mesh(np.asarray(target.devices), ("d",))
  split = jax.ShapeDtypeStruct((4096, 64), jnp.float32, sharding=NamedSharding(mesh, P("d")))
  kept = jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=NamedSharding(mesh, P()))

  def program(x, y):
    return y + 1, jax.lax.psum(jnp.sum(x), "d")

  jitted = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=(P("d"), P()), out_specs=P()), donate_argnums=1)
  found = plan.analyse(jitted.lower(split, kept), target)
  # A quarter of the first argument, the second one, and two scalars and pointers of outputs.
  assert found.arguments == 4096 * 64 * 4 // 4 + 4000
  assert 0 < found.outputs < 100
  assert found.hbm == found.arguments + found.outputs + found.temporaries + found.code
  assert [one.size for one in found.cost.collectives.values()] == [4]


def test_description(target):
  cost = hlo.Cost(
    3 * 10**9,
    {
      "a": hlo.Collective("all-gather", 2**28, 6, True),
      "b": hlo.Collective("all-gather", 2**27, 4, True),
      "c": hlo.Collective("all-reduce", 2**20),
    },
    0,
  )
  gib = 2**30
  text = plan.describe(plan.Plan(3 * gib, gib // 4, gib // 2, gib // 4, cost), target)
  assert text.splitlines() == [
    "4 devices of v5e:2x2, an estimate, from simulated CPU devices",
    "arguments              3 GiB",
    "outputs in new places  0.25 GiB",
    "temporaries            0.5 GiB",
    "program                0.25 GiB",
    "memory of a device     4 GiB of 16 GiB, 25%",
    "fits                   yes",
    "computing              2 s a step, the compiler's estimate",
    "exchanging             0.0215 s a step at the links' rate, partly at the same time",
    "all-gather             10 a step, in loops, 2 GiB",
    "all-reduce             1 a step, 1 MiB",
  ]
  text = plan.describe(plan.Plan(gib, 0, 0, 0, None), target._replace(devices=target.devices[:1]))
  assert text.startswith("1 device of v5e:2x2")
  assert text.endswith("not known: jaxlib cannot read this libtpu's program; pip install 'jax[tpu]'")
  text = plan.describe(plan.Plan(17 * gib, 0, 0, 0, hlo.Cost(0, {}, 0)), target)
  assert "106%\nfits                   no" in text
  assert "computing" not in text


def test_table():
  assert tables.format_table(("name", "s"), [("a", 1), ("longer", 22.5)]).splitlines() == [
    "name       s",
    "a          1",
    "longer  22.5",
  ]


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:8", "v5e:2x4 "])
def test_topologies_that_are_none(topology):
  with pytest.raises(UserError, match=rf"--topology={topology}: .*v4, v5e, v5p, v6e.*v5e:2x4"):
    plan.find_target(topology)


def test_more_devices_than_jax_started_with(target):
  with pytest.raises(UserError, match="64 devices cannot be simulated with 4; pip install"):
    plan.find_target("v5e:8x8")


class _Lowered:
  """A program that the compiler refuses."""

  def __init__(self, message):
    self._message = message

  def compile(self):
    raise jax.errors.JaxRuntimeError(self._message)


def test_what_does_not_fit(target):
  refused = _Lowered(
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (20.30G) exceeds available HBM (15.75G). HLO module: jit_step.\n"
    "See https://openxla.org/xla/errors/error_1000 for more details."
  )
  with pytest.raises(UserError, match=r"v5e:2x2: .*\(20.30G\) exceeds available HBM \(15.75G\); tak"):
    plan.analyse(refused, target)
  with pytest.raises(jax.errors.JaxRuntimeError, match="another reason"):
    plan.analyse(_Lowered("another reason"), target)


@pytest.fixture
def language():
  """An experiment on a tiny model."""
  config = language_config.language_config()
  config.data.source = "tofu"
  config.method.batch_size, config.train.batch_size = 6, 2
  validation.validate(config)
  return config


def test_texts_are_packed_as_the_loop_packs_them(language):
  devices = jax.devices()
  language.text.row_length = 200
  stage = language_plan.AbstractStage(language, TINY, devices, 100)
  # Six texts of 50 to 150 tokens: two of the shorter ones fit a row, or one of the longer.
  assert 3 <= stage.shape.rows <= 6
  assert stage.shape.tokens == 200
  assert 112 <= stage.shape.predictions <= 152
  assert stage.devices == (devices[0],)
  # One row at a time, on one device.
  assert stage.share == stage.shape.rows
  assert stage.trips == (1, stage.shape.rows)
  # A matrix A [in, 8] and B [8, out] for each projection of two layers.
  sides = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64)]
  assert stage.parameters[1] == 2 * sum(8 * (inputs + outputs) for inputs, outputs in sides)

  language.pairing = "pmap"
  split = language_plan.AbstractStage(language, TINY, devices, 100)
  assert split.devices == tuple(devices)
  assert split.share == -(-stage.shape.rows // 2)
  # One row holds any six texts, but not any six and their refusals.
  language.text.row_length = 900
  assert language_plan.AbstractStage(language, TINY, devices, 100).shape.rows == 1
  language.method.name = "dpo"
  assert language_plan.AbstractStage(language, TINY, devices, 100).shape.rows == 2
  language.devices = 6
  with pytest.raises(UserError, match="config.devices=6: there are 4"):
    language_plan.AbstractStage(language, TINY, devices, 100)


@pytest.mark.parametrize("method, pairing", [("rmu", "vmap"), ("ga", "pmap")])
def test_every_kind_of_step_is_traced(language, method, pairing):
  language.method.name, language.pairing, language.method.layer = method, pairing, 1
  stage = language_plan.AbstractStage(language, TINY, jax.devices(), 30)
  for lowered in (stage.step(), stage.plain()):
    state, *_ = lowered.out_info
    params = lowered.args_info[0][0].params
    assert jax.tree.map(lambda leaf: leaf.shape, state.params) == jax.tree.map(
      lambda leaf: leaf.shape, params
    )


def test_plan_of_an_experiment(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  sizes = dataclasses.replace(TINY, num_hidden_layers=3)
  file = tmp_path / "config.json"
  file.write_text(json.dumps(llama_config.to_hugging_face(sizes, "float32")))
  arguments = replaced(SMOKE, "--simulate", f"--config.language.path={tmp_path}", "--example-tokens=40")
  assert plan.run(arguments) == 0
  out = capsys.readouterr().out
  # An embedding; in each layer the projections of queries and outputs [64, 64], of keys and values
  # [64, 32], three of the MLP [64, 160], and two norms; a norm.
  frozen = 264 * 64 + 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64) + 64
  trained = 3 * 8 * (2 * 128 + 2 * 96 + 3 * 224)
  assert f"{tmp_path}, float32: {frozen:,} parameters, {trained:,} trained\n" in out
  assert "hamu-q, pmap, 4 texts a role\n" in out
  assert "assumed: 20 to 60 tokens, 40 on average" in out
  assert "4 devices of v5e:2x2, an estimate, from simulated CPU devices\n" in out
  assert re.search(r"^fits +yes$", out, re.MULTILINE)
  # The halves exchange their gradients, and little else, once a step.
  count, size = re.search(r"^collective-permute +(\d+) a step, ([\d.]+) MiB$", out, re.MULTILINE).groups()
  assert int(count) == 1
  assert float(size) == pytest.approx(4 * trained / 2**20, rel=0.01)


def test_plan_of_training_on_images(monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  assert (
    plan.run(
      [
        "hamu_jax.plan",
        "--config=configs/digits_hamu.py",
        "--topology=v5e:2x2",
        "--simulate",
        "--config.pairing=pmap",
        "--config.model.name=mlp",
        "--stage=pretrain",
        "--config.data.forget=memorization",
        "--config.data.forget_size=150",
        "--config.data.scores=absent.npz",
        "--config.train.batch_size=130",
      ]
    )
    == 0
  )
  out = capsys.readouterr().out
  # A hidden layer of 64, and biases.
  trained = 65 * 64 + 65 * 10
  assert out.startswith(f"model   mlp: {trained:,} parameters\nstep    pretrain, pmap, 130 images\n")
  assert "batch   at most 33 a role on a device\n" in out
  # The gradient, the loss, the accuracy and their counts.
  count, size = re.search(r"^all-reduce +(\d+) a step, ([\d.]+) MiB$", out, re.MULTILINE).groups()
  assert int(count) == 1
  assert float(size) == pytest.approx(4 * trained / 2**20, rel=0.01)


@pytest.mark.parametrize("answer", [17 * 2**30, plan.DoesNotFit("too large")])
def test_exit_status_of_what_does_not_fit(answer, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(language_plan.AbstractStage, "step", lambda stage: None)

  def analyse(*arguments):
    if isinstance(answer, UserError):
      raise answer
    return plan.Plan(answer, 0, 0, 0, hlo.Cost(0, {}, 0))

  monkeypatch.setattr(plan, "analyse", analyse)
  assert plan.run([*SMOKE, "--simulate"]) == 1
  captured = capsys.readouterr()
  assert "106%" in captured.out or captured.err == "error: too large\n"


@pytest.mark.parametrize(
  "changes, error",
  [
    ({2: "--simulate"}, "--topology is missing"),
    ({2: "--topology=v5e"}, "--topology=v5e: give a generation"),
    ({2: "--topology=v5e:0x0"}, "--topology=v5e:0x0: give a generation"),
    ({1: "--config=configs/cifar_hamu.py"}, "config.mesh.weights=2"),
    (
      {1: "--config=configs/cifar_hamu.py", 4: "--config.data.name=svhn", 5: "--stage=pretrain"},
      "config.data.name='svhn': the sizes",
    ),
    ({3: "--stage=retrain"}, "--stage='retrain': choose from pretrain, unlearn"),
    ({4: "--config.text.row_length=99"}, "config.text.row_length=99: the longest example has 150 tokens"),
    ({5: "--config.language.rematerialisation=full"}, "the nearest is config.language.rematerialization"),
    ({4: "--config.mesh.weights=3"}, "config.mesh.weights=3: 4 devices of a role"),
    ({5: "--config.language.rematerialization=none"}, "config.mesh.weights=2: without rematerialization"),
    ({5: "--example-tokens=few"}, "--example-tokens: invalid int value: 'few'"),
    ({5: "--example-tokens=0"}, "--example-tokens=0"),
    ({3: "--example-token=9"}, "unknown"),
    ({4: "--config.language.attention=cudnn", 5: "--config.language.dtype=bfloat16"}, "set it to 'xla'"),
    ({4: "--config.language.path=gpt2"}, "config.language.path='gpt2': no local folder"),
    ({4: "--compare"}, "--compare: there are no estimates of time"),
    ({4: "--config.method.batch_size=0"}, "config.method.batch_size=0"),
  ],
)
def test_bad_input_ends_in_one_line(changes, error, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  given = {change.partition("=")[0] for change in changes.values()}
  arguments = [
    changes.get(index, argument)
    for index, argument in enumerate(SMOKE)
    if index in changes or argument.partition("=")[0] not in given
  ]
  assert plan.run(replaced(arguments, "--simulate")) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err.count("\n") == 1
  assert error.lower() in captured.err.lower()


def test_help(capsys):
  assert plan.run(["hamu_jax.plan", "--help"]) == 0
  assert "--topology=v5e:2x4" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_plan_for_tpus():
  process = subprocess.run(
    [sys.executable, "-m", *SMOKE, "--compare"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": ""},
  )
  assert process.returncode == 0, process.stderr
  assert "4 devices of v5e:2x2, as compiled by libtpu\n" in process.stdout
  assert re.search(r"^computing +\S+ s a step", process.stdout, re.MULTILINE)
  ratios = re.search(r"^ratio +(.*)$", process.stdout, re.MULTILINE)[1].split()
  # A step does what the gradients take, and more.
  assert all(float(ratio) > 0.99 for ratio in ratios)
