"""Reads a Llama's weights from Hugging Face folders and writes them, tensor by tensor.

Submodules have Hugging Face's names. In this project the layers are stacked, [L, ...], and linear layers are
[inputs, outputs]. In a folder each layer has its own tensors, and linear layers are [outputs, inputs].
"""

import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from jax import lax

from hamu_jax import outside
from hamu_jax.errors import UserError
from hamu_jax.models import llama_config
from hamu_jax.models.llama_config import LlamaConfig

Tree = Any

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Old checkpoints hold the rotary frequencies, which follow from the configuration.
_IGNORED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Number of rows of these that are compared at a time.
_ROWS = 4096
# Largest size of a file; Hugging Face's default.
_SHARD_BYTES = 5 * 10**9


class Source(Protocol):
  """A set of tensors with Hugging Face's names, in any file format.

  Attributes:
    shapes: shape of each tensor by name; linear layers are [outputs, inputs].
  """

  shapes: dict[str, tuple[int, ...]]

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Reads the part of a tensor that `index` selects."""


class Tensor(NamedTuple):
  """A tensor of a folder: its name, its layer in the stack, and whether our parameter is its transpose."""

  name: str
  layer: int | None
  transposed: bool


def layout(path: tuple[str, ...], layers: int) -> list[Tensor]:
  """Lists the tensors of one parameter.

  Args:
    path: path of the parameter, such as ("layers", "mlp", "up_proj", "kernel").
    layers: L, number of layers.

  Returns:
    The tensor, or the tensors of all layers in order.
  """
  owner, transposed = ".".join(path[:-1]), path[-1] == "kernel"
  if path[0] == "lm_head":
    return [Tensor(_OUTPUT, None, transposed)]
  if path[0] != "layers":
    return [Tensor(f"model.{owner}.weight", None, transposed)]
  owner = owner.removeprefix("layers.")
  return [Tensor(f"model.layers.{i}.{owner}.weight", i, transposed) for i in range(layers)]


class SafetensorsFolder:
  """The weights of a Hugging Face folder, in one file or several.

  A file is mapped into memory only while one tensor is read, so that the mapped pages do not add up to the
  size of the model.

  Args:
    path: the folder.

  Raises:
    UserError: if the folder has no weights, a shard is missing, or a file is not safetensors.
  """

  def __init__(self, path: pathlib.Path):
    self.shapes: dict[str, tuple[int, ...]] = {}
    self._files: dict[str, pathlib.Path] = {}
    for file in _weight_files(path):
      with _open(file) as tensors:
        for name in tensors.keys():
          self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
          self._files[name] = file

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    file = self._files[name]
    what, remedy = f"safetensors at {name!r}", "save the weights in float32 or bfloat16"
    with _open(file) as tensors, outside.read_of(file, what, remedy):
      return tensors.get_slice(name)[index]


def has_own_output(source: Source) -> bool:
  """Whether a source holds an output matrix that differs from its embedding.

  If the output matrix is the embedding, the files may hold it a second time. But programs also save a trained
  output matrix under a configuration that still says `tie_word_embeddings`; transformers takes that matrix.
  """
  if _OUTPUT not in source.shapes or _EMBEDDING not in source.shapes:
    return False
  if source.shapes[_OUTPUT] != source.shapes[_EMBEDDING]:
    return True
  rows = source.shapes[_OUTPUT][0]
  pieces = [(slice(start, min(start + _ROWS, rows)), slice(None)) for start in range(0, rows, _ROWS)]
  return not all(
    np.array_equal(source.read(_OUTPUT, piece), source.read(_EMBEDDING, piece)) for piece in pieces
  )


def load(source: Source, like: Tree, config: LlamaConfig, *, where: str) -> Tree:
  """Loads the tensors of a source into a model's parameters.

  Each tensor is sent to its devices and written into its layer of the stack, which is updated
  without a copy. Host memory holds the tensor that is being read and at most the one before. On a CPU,
  the peak is at most one tensor above the size of the model, because the largest parameters are loaded
  first.

  Args:
    source: `SafetensorsFolder` or `llama_gguf.GGUFFile`.
    like: shapes and dtypes of the parameters, as from `llama.abstract_params`; each may have a sharding.
    config: configuration of the model.
    where: name of the source, for error messages.

  Returns:
    Parameters with the structure, shapes, dtypes and shardings of `like`.

  Raises:
    UserError: if a tensor is missing, unknown or of another shape.
  """
  flat = traverse_util.flatten_dict(like)
  tensors = {path: layout(path, config.num_hidden_layers) for path in flat}
  _check(source, flat, tensors, config, where)
  loaded = {}
  for path in sorted(flat, key=lambda path: -flat[path].size):
    leaf, parts = flat[path], tensors[path]
    place = jax.jit(_place, donate_argnums=0, static_argnums=(3, 4), out_shardings=leaf.sharding)
    value = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding) if path[0] == "layers" else None
    for part in parts:
      # Without blocking, reading would run ahead of the devices, and tensors would accumulate.
      value = jax.block_until_ready(
        place(value, _read(source, part, leaf.sharding), part.layer, part.transposed, leaf.dtype)
      )
    loaded[path] = value
  return traverse_util.unflatten_dict(loaded)


def load_folder(path: str | os.PathLike, like: Tree, config: LlamaConfig) -> Tree:
  """Loads a Hugging Face folder; see `load`.

  Raises:
    UserError: see `SafetensorsFolder` and `load`.
  """
  return load(SafetensorsFolder(pathlib.Path(path)), like, config, where=str(path))


def save_folder(
  path: str | os.PathLike, params: Tree, config: LlamaConfig, *, shard_bytes: int = _SHARD_BYTES
) -> None:
  """Writes a Hugging Face folder: `config.json` and one or several safetensors files.

  Args:
    path: the folder; it is created, and must not hold weights.
    params: parameters of the model, written in their own dtype.
    config: configuration of the model.
    shard_bytes: largest size of a file in bytes, unless a single tensor is larger. One file at a time is
      held in memory.

  Raises:
    UserError: if the folder already holds weights, or cannot be written.
  """
  folder = pathlib.Path(path)
  if found := sorted(folder.glob("*.safetensors")):
    raise UserError(f"{folder}: holds {found[0].name} already; choose an empty folder")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    dtype = params["embed_tokens"]["embedding"].dtype.name
    text = json.dumps(llama_config.to_hugging_face(config, dtype), indent=2, sort_keys=True)
    (folder / llama_config.CONFIG_FILE).write_text(text + "\n")
    _write_shards(folder, params, config, shard_bytes)
  except OSError as error:
    raise UserError(
      f"{folder}: cannot be written ({error.strerror or error}); choose another folder"
    ) from None


def _check(source, flat, tensors, config, where):
  """Refuses a source that does not fit the model, and names the first tensor at fault."""
  known = set()
  for path, parts in tensors.items():
    shape = flat[path].shape
    for part in parts:
      known.add(part.name)
      if part.name not in source.shapes:
        raise UserError(f"{where}: tensor {part.name!r} is missing; give the weights of this model")
      wanted = shape if part.layer is None else shape[1:]
      wanted = wanted[::-1] if part.transposed else wanted
      if source.shapes[part.name] != wanted:
        raise UserError(
          f"{where}: tensor {part.name!r} has shape {source.shapes[part.name]}, this model's has {wanted};"
          " give the weights of this model"
        )
  if config.tie_word_embeddings:
    known.add(_OUTPUT)
  unknown = {name for name in source.shapes if not re.fullmatch(_IGNORED, name)} - known
  if unknown:
    raise UserError(
      f"{where}: tensor {min(unknown)!r} is unknown ({len(unknown)} in all); give the weights of this model"
    )


def _read(source, tensor, sharding):
  """Reads one tensor to the devices of its parameter; a host reads the parts that its devices hold."""
  shape = source.shapes[tensor.name]
  if isinstance(sharding, jax.sharding.NamedSharding):
    # A PartitionSpec may be shorter than the parameter's rank.
    spec = sharding.spec + (None,) * (len(shape) + (tensor.layer is not None) - len(sharding.spec))
    spec = spec if tensor.layer is None else spec[1:]
    spec = jax.sharding.PartitionSpec(*(spec[::-1] if tensor.transposed else spec))
    sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
  if sharding is None:
    return jnp.asarray(source.read(tensor.name, (slice(None),) * len(shape)))
  return jax.make_array_from_callback(shape, sharding, lambda index: source.read(tensor.name, index))


def _place(stack, tensor, layer, transposed, dtype):
  """Writes a tensor into its layer of the stack; if `stack` is None, the tensor is the whole parameter."""
  tensor = (tensor.T if transposed else tensor).astype(dtype)
  if stack is None:
    return tensor
  return lax.dynamic_update_index_in_dim(stack, tensor, layer, 0)


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  if (folder / _FILE).is_file():
    return [folder / _FILE]
  index = folder / _INDEX
  if not index.is_file():
    raise UserError(
      f"{folder}: holds neither {_FILE} nor {_INDEX}; give the folder of a Llama, with its"
      " weights as safetensors"
    )
  values = outside.read_json(index, dict, "download it again")
  with outside.read_of(index, "an index of weights", "download it again"):
    names = sorted(set(values["weight_map"].values()))
    folder.joinpath(*names)
  for name in names:
    # A name must be a file next to the index; paths to other places are refused.
    if pathlib.PurePath(name).name != name or not (folder / name).is_file():
      raise UserError(f"{index}: its shard {name!r} is missing from the folder; download it again")
  return [folder / name for name in names]


def _open(file):
  with outside.read_of(file, "a safetensors file", "download it again"):
    return safetensors.safe_open(file, framework="numpy")


def _write_shards(folder, params, config, shard_bytes):
  flat = traverse_util.flatten_dict(params)
  owners = [(tensor, flat[path]) for path in flat for tensor in layout(path, config.num_hidden_layers)]
  shards = list(_group(owners, shard_bytes))
  weight_map, total = {}, 0
  for number, shard in enumerate(shards, 1):
    name = _FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
    arrays = {tensor.name: _to_host(tensor, value) for tensor, value in shard}
    write_safetensors(folder / name, arrays)
    weight_map |= dict.fromkeys(arrays, name)
    total += sum(array.nbytes for array in arrays.values())
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_safetensors(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes a safetensors file for PyTorch, with the permissions that the umask gives.

  safetensors itself would make the file readable by its owner only.

  Args:
    path: path of the file.
    arrays: tensors by name.
  """
  path.touch()
  mode = path.stat().st_mode
  safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
  path.chmod(mode)


def _group(owners, shard_bytes) -> Iterator[list]:
  """Yields groups of consecutive tensors: at least one, and at most `shard_bytes` in total if several."""
  group: list = []
  used = 0
  for tensor, value in owners:
    size = value.nbytes if tensor.layer is None else value.nbytes // value.shape[0]
    if group and used + size > shard_bytes:
      yield group
      group, used = [], 0
    group.append((tensor, value))
    used += size
  yield group


def _to_host(tensor, value):
  array = np.asarray(value if tensor.layer is None else value[tensor.layer])
  return np.ascontiguousarray(array.T if tensor.transposed else array)
