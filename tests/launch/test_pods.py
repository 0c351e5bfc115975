"""What the launcher of pods runs for each configuration of the papers: a program that can be compiled."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest

from hamu_jax.config import command_line as config_command_line
from hamu_jax.config import readers, validation
from hamu_jax.models import llama_config

ROOT = pathlib.Path(__file__).parent.parent.parent
PMAP = "--config.pairing=pmap"


class Launched(NamedTuple):
  """A configuration on a pod.

  Attributes:
    name: of the configuration.
    options: what else the launcher is given. Language models are made for pods.
    stage: that is compiled.
    parameters: trained ones.
    gradients: the collective that carries them, and how many gradients a step has it carry.
    layers: how many its Llama has, if not all.
  """

  name: str
  options: tuple[str, ...]
  stage: str
  parameters: int
  gradients: tuple[str, int]
  layers: int = 0


# The parameters of ResNets are those that their papers' PyTorch models have, Llama's those that PEFT counts.
_VIT = 12 * (12 * 384**2 + 13 * 384) + (48 + 1) * 384 + 66 * 384 + 2 * 384 + 385 * 100
CONFIGS = [
  Launched("cifar_hamu.py", (PMAP,), "unlearn", 272_474, ("collective-permute", 1)),
  Launched("cifar10_sharp.py:neggrad,high", (PMAP,), "unlearn", 11_173_962, ("collective-permute", 1)),
  Launched("cifar100_resnet50.py:neggrad,high", (PMAP,), "unlearn", 23_705_252, ("collective-permute", 1)),
  Launched("cifar100_vit_s.py:neggrad,high", (PMAP,), "unlearn", _VIT, ("collective-permute", 1)),
  Launched("imagenet_resnet50.py:neggrad,high", (PMAP,), "unlearn", 25_557_032, ("collective-permute", 1)),
  Launched("tofu_llama2_hamu.py", (), "unlearn", 19_988_480, ("collective-permute", 1)),
  # The model of the one before, so a few of its layers will do.
  Launched(
    "waterdrum_llama2_hamu.py:forget_10,semantic",
    (),
    "pretrain",
    19_988_480 * 4 // 32,
    ("all-reduce", 1),
    layers=4,
  ),
]
each_configuration = pytest.mark.parametrize("launched", CONFIGS, ids=[one.name for one in CONFIGS])


def on_each_host(launched, folder):
  """The arguments that the launcher gives to `hamu_jax.main` there.

  Sizes of fewer layers are left in the folder.
  """
  arguments = [f"--config=configs/{launched.name}", *launched.options, "--workdir=/mnt/runs/a b"]
  if launched.layers:
    sizes = dataclasses.replace(llama_config.PRESETS["llama2_7b"], num_hidden_layers=launched.layers)
    (folder / "config.json").write_text(json.dumps(llama_config.to_hugging_face(sizes, "bfloat16")))
    arguments.append(f"--config.language.path={folder}")
  done = subprocess.run(
    ["bash", ROOT / "launch" / "tpu_pod.sh", "slice", "zone-a", "hamu", *arguments],
    env=os.environ | {"DRY_RUN": "1"},
    capture_output=True,
    text=True,
    check=True,
  )
  *_, remote = shlex.split(done.stdout)
  _, _, command = remote.partition("-m hamu_jax.main ")
  return shlex.split(command)


@each_configuration
def test_launched_configuration_is_valid(launched, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  values = config_command_line.parse(["hamu_jax.main", *on_each_host(launched, tmp_path)])
  if values.config.data.forget == "memorization":
    values.config.data.scores = readers.ESTIMATE
  validation.validate(values.config)
  assert values.workdir == "/mnt/runs/a b"
  assert values.config.pairing == "pmap"
  assert values.config.distributed.coordinator == "auto"


@pytest.mark.slow
@each_configuration
def test_launched_program_compiles(launched, tmp_path):
  # By libtpu or, where that is missing, for simulated devices; either way in a hurry, in which the compiler
  # makes slower programs of the same collectives.
  hurry = {"JAX_OPTIMIZATION_LEVEL": "O0", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
  process = subprocess.run(
    [
      sys.executable,
      "-m",
      "hamu_jax.plan",
      *on_each_host(launched, tmp_path),
      "--topology=v5e:4x4",
      f"--stage={launched.stage}",
    ],
    cwd=ROOT,
    env=os.environ | hurry | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    capture_output=True,
    text=True,
    check=False,
  )
  out = process.stdout
  assert process.returncode == 0, process.stderr
  assert f" {launched.parameters:,} " in out.splitlines()[0]
  assert "16 devices of v5e:4x4, " in out
  assert re.search(r"^fits +yes$", out, re.MULTILINE)
  kind, times = launched.gradients
  sizes = re.findall(rf"^{kind} +\d+ a step(?:, in loops)?, ([\d.]+) (MiB|GiB)$", out, re.MULTILINE)
  moved = sum(float(size) * {"MiB": 2**20, "GiB": 2**30}[unit] for size, unit in sizes)
  # Beside them there are losses and, in training mode, batch statistics.
  assert moved == pytest.approx(times * 4 * launched.parameters, rel=0.02)
