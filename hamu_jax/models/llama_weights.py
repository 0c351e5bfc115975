"""A Llama's weights from and to Hugging Face folders, tensor by tensor.

Submodules have Hugging Face's names. Here the layers are stacked, [L, ...], and linear layers are
[inputs, outputs]; there each layer has tensors of its own, and they are [outputs, inputs].
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

from hamu_jax.errors import UserError
from hamu_jax.models import llama_config
from hamu_jax.models.llama_config import LlamaConfig

Tree = Any

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Old checkpoints hold the rotary frequencies, which the configuration gives; where the output
# matrix is the embedding, it may be there a second time.
_IGNORED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
_OUTPUT = "lm_head.weight"
# As Hugging Face shards them.
_SHARD_BYTES = 5 * 10**9


class Source(Protocol):
  """Tensors by Hugging Face's names, wherever they lie.

  Attributes:
    shapes: of all tensors, linear layers [outputs, inputs].
  """

  shapes: dict[str, tuple[int, ...]]

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """The part of a tensor that `index` selects."""


class Tensor(NamedTuple):
  """A tensor of a folder: its name, and the layer and orientation that it has in our parameters."""

  name: str
  layer: int | None
  transposed: bool


def layout(path: tuple[str, ...], layers: int) -> list[Tensor]:
  """The tensors that one parameter is made of.

  Args:
    path: of the parameter, such as ("layers", "mlp", "up_proj", "kernel").
    layers: L.

  Returns:
    The tensor, or those of all layers in order.
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

  Files are mapped into memory, and only as long as one tensor is read, so that the mapped pages do
  not add up to the size of the model.

  Args:
    path: the folder.

  Raises:
    UserError: no weights, a missing shard, or a file that is not safetensors.
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
    with _open(self._files[name]) as tensors:
      return tensors.get_slice(name)[index]


def load(source: Source, like: Tree, config: LlamaConfig, *, where: str) -> Tree:
  """Puts the tensors of a source into a model's parameters.

  Each tensor goes straight to its devices and there into its place in the stack, which is updated
  without a copy: host memory holds the one that is read and, at most, the one before. Where the
  devices' memory is the host's, it peaks at no more than one tensor above the model, because the
  largest parameters come first, while there is room.

  Args:
    source: `SafetensorsFolder` or `llama_gguf.GGUFFile`.
    like: `llama.abstract_params`; the sharding of a leaf, if it has one, is the parameter's.
    config: sizes.
    where: names the source in errors.

  Returns:
    Parameters of the structure, shapes, dtypes and shardings of `like`.

  Raises:
    UserError: a tensor is missing, unknown or of another shape.
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
      # Otherwise reading would run ahead of the devices, and tensors pile up.
      value = jax.block_until_ready(
        place(value, _read(source, part, leaf.sharding), part.layer, part.transposed, leaf.dtype)
      )
    loaded[path] = value
  return traverse_util.unflatten_dict(loaded)


def load_folder(path: str | os.PathLike, like: Tree, config: LlamaConfig) -> Tree:
  """`load` from a Hugging Face folder.

  Raises:
    UserError: see `SafetensorsFolder` and `load`.
  """
  return load(SafetensorsFolder(pathlib.Path(path)), like, config, where=str(path))


def save_folder(
  path: str | os.PathLike, params: Tree, config: LlamaConfig, *, shard_bytes: int = _SHARD_BYTES
) -> None:
  """Writes a Hugging Face folder: `config.json` and safetensors, in several files if need be.

  Args:
    path: the folder; it is created, and must hold no weights.
    params: of the model, in their own dtype.
    config: sizes.
    shard_bytes: most bytes of a file, as far as single tensors allow; as many are held in memory.

  Raises:
    UserError: the folder holds weights already, or cannot be written.
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
    raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None


def _check(source, flat, tensors, config, where):
  """Names the first tensor that does not fit."""
  known = set()
  for path, parts in tensors.items():
    shape = flat[path].shape
    for part in parts:
      known.add(part.name)
      if part.name not in source.shapes:
        raise UserError(f"{where}: tensor {part.name!r} is missing; is it another model?")
      wanted = shape if part.layer is None else shape[1:]
      wanted = wanted[::-1] if part.transposed else wanted
      if source.shapes[part.name] != wanted:
        raise UserError(
          f"{where}: tensor {part.name!r} has shape {source.shapes[part.name]}, this model's has {wanted}"
        )
  if config.tie_word_embeddings:
    known.add(_OUTPUT)
  unknown = {name for name in source.shapes if not re.fullmatch(_IGNORED, name)} - known
  if unknown:
    raise UserError(
      f"{where}: tensor {min(unknown)!r} is unknown ({len(unknown)} in all); is it another model?"
    )


def _read(source, tensor, sharding):
  """One tensor, on the devices of its parameter; a host reads the parts that its devices hold."""
  shape = source.shapes[tensor.name]
  if isinstance(sharding, jax.sharding.NamedSharding):
    # A specification may be shorter than the parameter's rank.
    spec = sharding.spec + (None,) * (len(shape) + (tensor.layer is not None) - len(sharding.spec))
    spec = spec if tensor.layer is None else spec[1:]
    spec = jax.sharding.PartitionSpec(*(spec[::-1] if tensor.transposed else spec))
    sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
  if sharding is None:
    return jnp.asarray(source.read(tensor.name, (slice(None),) * len(shape)))
  return jax.make_array_from_callback(shape, sharding, lambda index: source.read(tensor.name, index))


def _place(stack, tensor, layer, transposed, dtype):
  """Writes a tensor into its place in the stack; it is the whole parameter where that is None."""
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
  try:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{index}: no index of weights ({error!r})") from None
  for name in names:
    # A name is a file beside the index, not a path to anywhere.
    if pathlib.PurePath(name).name != name or not (folder / name).is_file():
      raise UserError(f"{index}: its shard {name!r} is missing from the folder; download it again")
  return [folder / name for name in names]


def _open(file):
  try:
    return safetensors.safe_open(file, framework="numpy")
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f"{file}: not a safetensors file ({error})") from None


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
  """Writes a file for PyTorch's readers, which others may read as far as the umask says.

  safetensors' own file is for its owner alone.
  """
  path.touch()
  mode = path.stat().st_mode
  safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
  path.chmod(mode)


def _group(owners, shard_bytes) -> Iterator[list]:
  """Consecutive tensors that together take at most `shard_bytes`, but at least one."""
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
