"""Models of the Hugging Face hub, as local folders."""

import pathlib

from hamu_jax.errors import CONNECT_SECONDS, UserError, first_line

# Files in formats that hold code, or that are not read here, are not downloaded.
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def local_folder(name: str) -> pathlib.Path:
  """Returns the folder of a model. A hub id is downloaded, or found in the hub's local cache.

  Args:
    name: a folder, or a hub id such as "meta-llama/Llama-2-7b-chat-hf".

  Returns:
    The folder.

  Raises:
    UserError: if neither exists, if the model is gated, or if the hub cannot be reached and the cache does
      not have the model.
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
  except OSError as error:  # from the network, the disk, or the hub's client
    raise UserError(
      f"model {name!r} is not a folder, and cannot be downloaded ({first_line(error)}); give the"
      " folder of a model that was downloaded elsewhere"
    ) from None
