"""Configurations that the package ships: `hamu_jax:NAME[:VARIANT]` names one of its files.

An installed package contains them, so no clone is needed: `hamu_jax:cifar_hamu:smoke` is the same as
`configs/cifar_hamu.py:smoke` in the root of a clone, and `hamu_jax:sweeps/cifar_rho` is a sweep.
"""

import difflib
import pathlib

from hamu_jax.errors import UserError

PREFIX = "hamu_jax:"
_PACKAGE = pathlib.Path(__file__).parent.parent
# The folder in a wheel, and the folder in a clone.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def find(reference: str) -> str:
  """Finds the path of a configuration that is given by its name.

  Args:
    reference: the value of `--config`.

  Returns:
    PATH[:VARIANT] for `hamu_jax:NAME[:VARIANT]`; any other reference unchanged.

  Raises:
    UserError: the package ships no configuration of this name.
  """
  if not reference.startswith(PREFIX):
    return reference
  name, colon, variant = reference.removeprefix(PREFIX).partition(":")
  folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
  if folder is None:
    raise UserError(
      f"--config={reference}: the configurations are neither in {_FOLDERS[0]} nor in {_FOLDERS[1]}; install "
      "hamu-jax again"
    )
  files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.py"))}
  if name not in files:
    # A list of all names would be too long for one line.
    nearest = difflib.get_close_matches(name, files, n=3, cutoff=0)
    raise UserError(
      f"--config={reference}: hamu_jax ships no configuration {name!r}; the nearest are "
      + ", ".join(PREFIX + each for each in nearest)
    )
  return f"{files[name]}{colon}{variant}"
