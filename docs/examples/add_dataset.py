r"""A new source of images: arrays in an .npz file.

  python docs/examples/add_dataset.py runs/digits.npz
  python -m hamu_jax.main --config=docs/examples/add_dataset.py --workdir=runs/npz \
    --config.data.path=runs/digits.npz

The first command makes such a file of scikit-learn's digits.
"""

import pathlib
import sys

import numpy as np

from hamu_jax import data
from hamu_jax.config import default_config
from hamu_jax.config.digits import on_digits
from hamu_jax.data.dataset import Contents
from hamu_jax.errors import UserError

FIELDS = ("train_images", "train_labels", "test_images", "test_labels", "class_names")


# --8<-- [start:source]
def read_npz(request):
  """Reads images [N, H, W, C] of type uint8, labels [N] and the classes' names."""
  try:
    with np.load(request.path, allow_pickle=False) as file:
      arrays = {field: file[field] for field in FIELDS}
  except (OSError, ValueError, KeyError) as error:
    raise UserError(
      f"config.data.path={request.path!r}: {error}; give an .npz file with {', '.join(FIELDS)}"
    ) from error
  return Contents(
    data.ImageSplit(arrays["train_images"], arrays["train_labels"]),
    data.ImageSplit(arrays["test_images"], arrays["test_labels"]),
    tuple(str(name) for name in arrays["class_names"]),
  )


data.SOURCES["npz"] = read_npz
# --8<-- [end:source]


def get_config():
  """A tenth of the examples, drawn at random, is to be forgotten."""
  config = on_digits(default_config(), "mlp")
  config.data.update(source="npz", name="my digits", forget="random", forget_fraction=0.1)
  config.method.update(epochs=4.0, constraint_ratio=0.1, on_infeasible="project")
  return config


def write_digits(path):
  """Leaves the embedded digits in the form that `read_npz` takes."""
  digits = data.load("digits")
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  np.savez(
    path,
    train_images=digits.train.images,
    train_labels=digits.train.labels,
    test_images=digits.test.images,
    test_labels=digits.test.labels,
    class_names=digits.class_names,
  )


if __name__ == "__main__":
  write_digits(sys.argv[1])
