"""What the wheel has beside the packages; everything else of it is in pyproject.toml."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# Folders of the repository that the package brings along, by the package that they become.
BESIDE = {
  "hamu_jax.configs": "configs",
  "hamu_jax.configs.sweeps": "configs/sweeps",
  "hamu_jax.launchers": "launch",
}


class BuildPy(build_py):
  """Takes the shell launchers of launch/ but not its module, which is for clones."""

  def find_package_modules(self, package, package_dir):
    """See the class."""
    return [] if package == "hamu_jax.launchers" else super().find_package_modules(package, package_dir)


setup(
  packages=[*find_packages(include=["hamu_jax*", "sam_jax*"]), *BESIDE],
  package_dir=BESIDE,
  package_data={
    "hamu_jax.launchers": ["*.sh", "*.sbatch"],
    # A small decoder, see hamu_jax.models.pretrained.
    "hamu_jax.models": ["invented/*"],
  },
  cmdclass={"build_py": BuildPy},
)
