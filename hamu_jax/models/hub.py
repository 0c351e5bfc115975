"""Models of the Hugging Face hub, as local folders."""

import pathlib

from hamu_jax.errors import CONNECT_SECONDS, UserError, first_line

# Weights in formats that hold code, or that nothing here reads, are left where they are.
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def local_folder(name: str) -> pathlib.Path:
  """The folder of a model, which is downloaded, or found in the hub's cache, if it is none itself.

  Args:
    name: a folder, or a hub id such as "meta-llama/Llama-2-7b-chat-hf".

  Raises:
    UserError: neither exists, the model is gated, or the hub cannot be reached and the cache does
      not have it.
  """
  folder = pathlib.Path(name)
  if folder.is_dir():
    return folder
  import huggingface_hub
  from huggingface_hub import errors

  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(name, allow_patterns=list(_PATTERNS), etag_timeout=CONNECT_SECONDS)
    )
  except errors.GatedRepoError:
    raise UserError(
      f"model {name!r} is gated: accept its terms on its page of the Hugging Face hub and log in"
      " with `hf auth login`, or give a folder that holds it"
    ) from None
  except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
    raise UserError(
      f"model {name!r} is neither a folder nor a public model of the Hugging Face hub"
      f" ({first_line(error)}); check the name, or log in with `hf auth login` if it is private"
    ) from None
  except OSError as error:  # Of the network, the disk, or the hub's client.
    raise UserError(
      f"model {name!r} is no folder, and cannot be downloaded ({first_line(error)}); give the"
      " folder of a model that was downloaded elsewhere"
    ) from None
