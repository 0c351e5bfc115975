"""Turns a PyTorch checkpoint (.pth, .pth.tar) into a safetensors file, in an environment that has PyTorch.

python convert_checkpoint.py CHECKPOINT WEIGHTS.safetensors
"""

import re
import sys

import torch
from safetensors.numpy import save_file

# What wrappers put before the names: DataParallel, torch.compile, and the sharpness paper's ViT.
WRAPPERS = re.compile(r"(module\.|_orig_mod\.)*(vit\.)?")


# --8<-- [start:convert]
def convert(checkpoint, out):
  """Writes the tensors of a checkpoint to a safetensors file; prints the normalization that it contains."""
  # A checkpoint is a pickle. With weights_only, PyTorch refuses all but tensors and plain values in it.
  content = torch.load(checkpoint, map_location="cpu", weights_only=True)
  tensors = {}
  for name, tensor in content.get("state_dict", content).items():
    name = WRAPPERS.sub("", name, count=1)
    value = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    if name in ("normalize.mean", "normalize.std"):
      numbers = tuple(round(number, 6) for number in value.tolist())
      print(f'--config.data.{name.removeprefix("normalize.")}="{numbers}"')
    else:
      tensors[name] = value
  save_file(tensors, out)


# --8<-- [end:convert]


if __name__ == "__main__":
  convert(*sys.argv[1:])
