"""A merged folder is a model that computes what the adapted one does, or a line says why not."""

import json
import shutil
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from hamu_jax.language import merge
from hamu_jax.models import llama, lora, lora_weights, pretrained, tokenizer

_TEXT = "What is <eos> in Ünïcode?\n\tNothing."
# Every fourth token's logits are stored.
_STORED = 4


class Folders(NamedTuple):
  """A Llama of `golden/llama` with a tokenizer, and its adapter, which names it."""

  base: Any
  adapter: Any
  expected: dict

  def logits(self, path, adapter=None):
    """Of the model in a folder, with the adapter in another where there is one."""
    opened = pretrained.open_model(str(path), preset="", seed=0)
    model = llama.Llama(opened.config)
    params = opened.load(llama.abstract_params(model))
    config, variables = lora.LoraConfig(), {"params": params}
    if adapter is not None:
      config, variables[lora.COLLECTION] = lora_weights.load_adapter(adapter, params)
    apply = lora.with_lora(model.apply, config)
    return np.asarray(apply(variables, jnp.asarray(self.expected["input_ids"])))


@pytest.fixture
def prepare(golden, tmp_path):
  """-> function: copies of a golden Llama and its adapter."""

  def copied(shape, base_name=None):
    folders = [tmp_path / f"{shape}-{part}" for part in ("base", "adapter")]
    source = golden / "llama" / shape
    shutil.copytree(source, folders[0], ignore=lambda *_: ["adapter", "expected.npz"])
    shutil.copytree(source / "adapter", folders[1])
    tokenizer.byte_tokenizer().save(folders[0])
    file = folders[1] / "adapter_config.json"
    name = str(folders[0]) if base_name is None else base_name
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    with np.load(source / "expected.npz") as arrays:
      return Folders(*folders, dict(arrays))

  return copied


def _merge(*arguments):
  return merge.run(["hamu_jax.merge", *arguments])


@pytest.mark.parametrize("shape", ["gqa_tied", "llama2_like", "llama3_scaled"])
def test_a_plain_model_computes_the_same(prepare, tmp_path, capsys, shape):
  folders, out = prepare(shape), tmp_path / "merged"
  assert _merge(f"--adapter={folders.adapter}", f"--out={out}") == 0
  assert str(out) in capsys.readouterr().out
  merged = folders.logits(out)
  np.testing.assert_allclose(merged, folders.logits(folders.base, folders.adapter), atol=1e-5)
  # What PEFT computes; that of padding is not stored.
  valid = folders.expected["attention_mask"] == 1
  stored = folders.expected["lora_logits"][valid]
  np.testing.assert_allclose(merged[:, :, ::_STORED][valid], stored, rtol=0, atol=2e-4)
  assert np.abs(merged - folders.logits(folders.base)).max() > 1e-2


def test_tokenizer_and_ends(prepare, tmp_path):
  """The tokenizer's <eos> is 257, the configuration's 2; whoever reads the folder stops at both."""
  folders, out = prepare("gqa_tied"), tmp_path / "merged"
  merge.merge(folders.adapter, out)
  before, after = map(tokenizer.from_folder, (folders.base, out))
  assert after.fingerprint == before.fingerprint
  assert after.encode(_TEXT) == before.encode(_TEXT)
  assert after.chat(_TEXT, "Yes.") == "<bos>Q: " + _TEXT + "\nA: Yes.<eos>"
  assert after.eos_token_ids == (257, 2)
  assert json.loads((out / "config.json").read_text())["eos_token_id"] == [257, 2]


def test_weights_in_half_precision(prepare, tmp_path):
  folders, out = prepare("llama2_like"), tmp_path / "merged"
  assert _merge(f"--adapter={folders.adapter}", f"--out={out}", "--dtype=bfloat16") == 0
  assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
  tensors = safetensors.numpy.load_file(out / "model.safetensors")
  assert {value.dtype.name for value in tensors.values()} == {"bfloat16"}


def test_a_base_that_is_named_wins(prepare, tmp_path):
  folders, out = prepare("gqa_tied", base_name="no/such-model"), tmp_path / "merged"
  arguments = f"--adapter={folders.adapter}", f"--out={out}"
  assert _merge(*arguments) == 2
  assert _merge(*arguments, f"--base={folders.base}") == 0


def _refused(capsys, *arguments):
  """The one line of a refusal."""
  assert _merge(*arguments) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1
  return error


def test_a_folder_with_weights_is_left_alone(prepare, tmp_path, capsys):
  folders = prepare("gqa_tied")
  before = (folders.base / "model.safetensors").read_bytes()
  error = _refused(capsys, f"--adapter={folders.adapter}", f"--out={folders.base}")
  assert "holds model.safetensors already; choose an empty folder" in error
  assert (folders.base / "model.safetensors").read_bytes() == before
  _refused(capsys, f"--adapter={folders.adapter}", f"--out={folders.adapter}")


def test_an_adapter_of_another_model(prepare, tmp_path, capsys):
  adapter, base = prepare("gqa_tied").adapter, prepare("llama2_like").base
  error = _refused(capsys, f"--adapter={adapter}", f"--base={base}", f"--out={tmp_path / 'merged'}")
  assert "the adapter is for another one" in error
  assert not (tmp_path / "merged").exists()


def test_a_base_that_is_not_there(prepare, tmp_path, capsys):
  nameless = prepare("gqa_tied", base_name="").adapter
  arguments = f"--adapter={nameless}", f"--out={tmp_path / 'merged'}"
  assert "--base is missing" in _refused(capsys, *arguments)
  assert "'no/such-model'" in _refused(capsys, *arguments, "--base=no/such-model")


@pytest.mark.parametrize(
  "arguments, part",
  [
    (["--out=merged"], "--adapter"),
    (["--adapter=runs/unlearned"], "--out"),
    (["--adapter=no-such-folder", "--out=merged"], "give the folder of a PEFT adapter"),
    (["--adapter=a", "--out=b", "--dtype=int8"], "--dtype='int8': choose from float32"),
    (["--adapter=a", "--out=b", "--rank=8"], "--rank=8"),
  ],
)
def test_command_lines_that_say_too_little(capsys, arguments, part):
  assert part in _refused(capsys, *arguments)


def test_an_adapter_that_is_damaged(prepare, tmp_path, capsys):
  folders = prepare("gqa_tied")
  (folders.adapter / "adapter_config.json").write_text("{")
  error = _refused(capsys, f"--adapter={folders.adapter}", f"--out={tmp_path / 'merged'}")
  assert "cannot be read as JSON" in error
