"""Names of models: folders, the hub's cache, and what the hub refuses. Nothing is downloaded."""

import fnmatch

import huggingface_hub
import pytest
from huggingface_hub import errors

from hamu_jax.errors import UserError
from hamu_jax.models import hub

_GATED = "meta-llama/Llama-2-7b-chat-hf"


def _answer(monkeypatch, answer):
  """Makes the hub's client return a folder or raise an exception; returns how it was called."""
  calls = {}

  def download(name, **options):
    calls.update(options, name=name)
    if isinstance(answer, Exception):
      raise answer
    return answer

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  return calls


def test_a_folder_is_itself(tmp_path, monkeypatch):
  calls = _answer(monkeypatch, None)
  assert hub.local_folder(str(tmp_path)) == tmp_path
  assert not calls


def test_an_id_is_downloaded_without_what_may_hold_code(tmp_path, monkeypatch):
  calls = _answer(monkeypatch, str(tmp_path))
  assert hub.local_folder(_GATED) == tmp_path
  assert calls["name"] == _GATED

  def wanted(file):
    return any(fnmatch.fnmatch(file, pattern) for pattern in calls["allow_patterns"])

  # The files of that repository, and of others like it.
  assert all(
    map(
      wanted,
      (
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
      ),
    )
  )
  assert not any(
    map(wanted, ("pytorch_model-00001-of-00002.bin", "modeling_llama.py", "original/consolidated.00.pth"))
  )


def _raised(kind, message):
  # Their constructors want the response of one HTTP library or another.
  return kind.__new__(kind, message)


@pytest.mark.parametrize(
  "error, message",
  [
    (_raised(errors.GatedRepoError, "403"), "is gated: accept its terms on .*log in with"),
    (_raised(errors.RepositoryNotFoundError, "404"), "neither a folder nor .*; check the name"),
    (OSError("disk full"), r"cannot be downloaded \(disk full\); give the folder"),
  ],
)
def test_what_the_hub_refuses(monkeypatch, error, message):
  _answer(monkeypatch, error)
  with pytest.raises(UserError, match=f"model '{_GATED}' .*{message}") as caught:
    hub.local_folder(_GATED)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "name, message",
  [
    ("no/such/folder", "neither a folder nor a public model"),
    ("nobody/not-in-the-cache", "is not a folder, and cannot be downloaded"),
  ],
)
def test_names_of_nothing(name, message):
  """With the hub's own client, which the tests keep offline."""
  with pytest.raises(UserError, match=message):
    hub.local_folder(name)
