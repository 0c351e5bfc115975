"""Merges an adapter into its base model, for programs that cannot load adapters.

  python -m hamu_jax.merge --adapter=runs/tofu/unlearned --out=merged

writes a Hugging Face folder (`config.json`, safetensors and the tokenizer), which transformers and vLLM can
load. The base model is the one that the adapter names, or `--base`: a Hugging Face folder or hub id, a GGUF
file, "smollm2" or "invented". `--dtype` is the type of the weights: float32 (the default), bfloat16 or
float16.
"""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp

from hamu_jax.config.fields.language import DTYPES
from hamu_jax.config.kinds import choice
from hamu_jax.errors import UserError
from hamu_jax.models import llama, llama_weights, lora, lora_weights, peft_config, pretrained
from hamu_jax.run import command_line


def merge(
  adapter: str | os.PathLike, out: str | os.PathLike, *, base: str = "", dtype: str = "float32"
) -> None:
  """Writes the folder of a model that computes the same as the adapted one.

  Args:
    adapter: folder in PEFT's format.
    out: folder to write, which must hold no weights. Its `config.json` lists all tokens by which the base
      model's configuration or tokenizer ends a text.
    base: base model, see `pretrained.open_model`; "" for the one that the adapter names.
    dtype: type of the written weights.

  Raises:
    UserError: the base or the adapter is missing, they do not fit each other, or `out` holds weights.
  """
  choice("--dtype", dtype, DTYPES)
  # Checked first, because reading and merging take minutes.
  if found := sorted(pathlib.Path(out).glob("*.safetensors")):
    raise UserError(f"--out={out}: holds {found[0].name} already; choose an empty folder")
  model = pretrained.open_model(base or _named_base(pathlib.Path(adapter)), preset="", seed=0)
  like = llama.abstract_params(llama.Llama(model.config, param_dtype=jnp.dtype(dtype)))
  config, factors = lora_weights.load_adapter(adapter, like)
  params = lora.merge(model.load(like), factors, config)
  ends = dict.fromkeys((*model.tokenizer.eos_token_ids, *model.config.eos_token_ids))
  sizes = dataclasses.replace(model.config, eos_token_ids=tuple(ends))
  llama_weights.save_folder(out, params, sizes)
  model.tokenizer.save(out)


def _named_base(adapter: pathlib.Path) -> str:
  """The base model that the adapter names."""
  if base := peft_config.read(adapter).base_model:
    return base
  raise UserError(
    f"--base is missing: {adapter / peft_config.CONFIG_FILE} names no base model; give its folder or hub id, "
    "'smollm2' or 'invented'"
  )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  parser = command_line.Parser(prog="python -m hamu_jax.merge", description=__doc__)
  parser.add_argument("--adapter", required=True, help="folder of the adapter, in PEFT's format")
  parser.add_argument("--out", required=True, help="folder to write")
  parser.add_argument("--base", default="", help="the base model, if not the one the adapter names")
  parser.add_argument("--dtype", default="float32", help=f"of the weights: {', '.join(DTYPES)}")
  return parser.parse_args(arguments)


def run(arguments: Sequence[str]) -> int:
  """Parses a command line and merges.

  Args:
    arguments: as `sys.argv`, the program's name first.

  Returns:
    The exit status: 0, or 2 for bad input.
  """

  def program():
    options = _parse(arguments[1:])
    merge(options.adapter, options.out, base=options.base, dtype=options.dtype)
    print(f"the merged model is in {options.out}")

  return command_line.run(program)
