"""What the tests of a report have in common."""

import pytest

from tests.report import reported


@pytest.fixture(scope="package")
def runs(tmp_path_factory):
  """hamu-q of three seeds, ft of one with a torn line, and a half-finished ga."""
  folder = tmp_path_factory.mktemp("runs")
  for seed, value in ((1, 0.5), (2, 0.6), (3, 0.9)):
    reported.write(folder / f"q{seed}", values=(1.0, value, value), seed=seed)
  reported.write(folder / "ft", method="ft", values=(0.5, 0.25, 0.125), torn='{"stage": "unl')
  reported.write(folder / "half", method="ga", finished=False)
  return folder
