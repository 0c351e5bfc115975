"""What the figures of a report show, read back from their axes; and that no text runs into another."""

import numpy as np
import pytest
from PIL import Image

from hamu_jax.report import figures, result_plots
from hamu_jax.transforms import BRANCHES
from tests.readable import assert_readable
from tests.report import cases


def test_angles_are_means_over_tensors_and_seeds():
  runs = [cases.run(seed, diagnostics=cases.diagnostics(seed)) for seed in (1, 2)]
  figure = figures.angle(cases.study(*runs))
  (axis,) = figure.axes
  expected = np.mean([run.diagnostics["angle"][1].mean(1) for run in runs], axis=0)
  np.testing.assert_allclose(cases.line(axis, "hamu-q"), np.c_[np.arange(1, 13), expected])
  assert_readable(figure)


def test_branches_are_shares_of_all_tensors():
  rectified = float(BRANCHES.index("rectified"))
  direct = float(BRANCHES.index("direct"))
  steps = np.array([1, 2])
  runs = [
    cases.run(seed, diagnostics={"branch": (steps, np.array([[direct, direct], [direct, last]]))})
    for seed, last in ((1, direct), (2, rectified))
  ]
  figure = figures.branch(cases.study(*runs))
  (axis,) = figure.axes
  assert [text.get_text() for text in figure.legends[0].get_texts()] == ["direct", "rectified"]
  inside = [layer.get_paths()[0].contains_point((2, 80)) for layer in axis.collections]
  assert inside == [False, True]  # at step 2 three of four tensors go directly
  inside = [layer.get_paths()[0].contains_point((2, 70)) for layer in axis.collections]
  assert inside == [True, False]
  assert_readable(figure)


def test_bars_are_means_and_dots_are_seeds():
  runs = [
    cases.run(seed, unlearned=(1, 1, value), seconds=value * 4)
    for seed, value in ((1, 0.5), (2, 0.8), (3, 0.8))
  ]
  figure = figures.tug_of_war(cases.study(*runs))
  (axis,) = figure.axes
  assert [bar.get_width() for bar in axis.patches] == [pytest.approx(0.7)]
  (segment,) = [s for c in axis.collections for s in c.get_segments()]
  np.testing.assert_allclose(segment[:, 0], 0.7 + np.std([0.5, 0.8, 0.8], ddof=1) * np.array([-1, 1]))
  dots = [line.get_xdata() for line in axis.get_lines() if line.get_marker() == "o"]
  np.testing.assert_allclose(dots, [[0.5, 0.8, 0.8]])
  seconds, per_step = figures.timing(cases.study(*runs)).axes
  assert seconds.patches[0].get_width() == pytest.approx(2.8)
  assert per_step.patches[0].get_width() == pytest.approx(0.7)


@pytest.mark.parametrize(
  "methods, levels", ((("hamu-q",), ("high",)), ([f"scrub_distill{i}" for i in range(12)], ("high", "mid")))
)
def test_few_and_many_are_readable(methods, levels):
  study = cases.study(
    *(
      run._replace(diagnostics=cases.diagnostics(1))
      for level in levels
      for run in cases.sweep(methods, (0.1, 0.25), (1,), data__memorization_level=level)
    )
  )
  study = study._replace(label="parquet, uoft-cs/cifar10, train_size 2000, test_size 1000, image_size 224")
  for draw in (result_plots.tradeoff, figures.tug_of_war, figures.angle):
    assert_readable(draw(study))
  assert_readable(result_plots.curve(study, "method.constraint_ratio"))


def test_nothing_to_show_is_no_figure(tmp_path):
  unfinished = cases.run()._replace(summary=None)
  assert figures.draw(cases.study(unfinished), tmp_path) == []
  without_reference = cases.run(results={"unlearned": {"retain": {"accuracy": 1.0}}})
  pictures = figures.draw(cases.study(without_reference), tmp_path)
  assert [picture.name for picture in pictures] == ["timing"]


def test_files_are_whole(tmp_path):
  study = cases.study(*(run._replace(diagnostics=cases.diagnostics(1)) for run in cases.sweep(("hamu-q",))))
  pictures = figures.draw(study, tmp_path)
  assert [picture.name for picture in pictures] == [
    "distances",
    "tradeoff",
    "curve-constraint_ratio",
    "tug_of_war",
    "angle",
    "branch",
    "timing",
  ]
  for picture in pictures:
    with Image.open(tmp_path / f"{picture.name}.png") as image:
      image.verify()
    pdf = (tmp_path / f"{picture.name}.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and pdf.rstrip().endswith(b"%%EOF")
