"""What the figures of a report show, read back from their axes; and that no text runs into another."""

import itertools
import pathlib

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from hamu_jax.config import default as config_lib
from hamu_jax.report import figures as report_plots
from hamu_jax.report import gather
from hamu_jax.run import rundir
from hamu_jax.transforms import BRANCHES

DEFAULTS = dict(rundir.fields(rundir.jsonable(config_lib.default_config().to_dict())))
SPLITS = ("retain", "forget", "test")


def _run(seed=1, *, unlearned=(1, 0.5, 0.9), diagnostics=None, results=None, seconds=8.0, **fields):
  """A finished run with the given accuracies."""
  fields = {name.replace("__", "."): value for name, value in fields.items()}
  unlearned = {split: {"accuracy": accuracy} for split, accuracy in zip(SPLITS, unlearned)} | {
    "tug_of_war": unlearned[2]
  }
  retrained = {split: {"accuracy": accuracy} for split, accuracy in zip(SPLITS, (0.95, 0.3, 0.8))}
  summary = {
    "results": results or {"unlearned": unlearned, "retrained": retrained, "original": retrained},
    "steps": 4,
    "seconds": {"unlearn": seconds},
    "provenance": {"data_fingerprint": "d", "device": "cpu", "devices": 1},
  }
  return gather.Run(
    pathlib.Path("run"), DEFAULTS | fields | {"seed": seed}, summary, ("unlearn", 4), diagnostics or {}
  )


def _study(*runs):
  (study,) = gather.studies(runs)
  return study


def _sweep(methods=("hamu-q", "hamu-u"), ratios=(0.1, 0.5, 0.9), seeds=(1, 2), **fields):
  rng = np.random.default_rng(0)
  return [
    _run(
      seed,
      unlearned=rng.uniform(0.2, 1, 3),
      seconds=rng.uniform(1, 9),
      **fields,
      method__name=method,
      method__constraint_ratio=ratio,
    )
    for method in methods
    for ratio in ratios
    for seed in seeds
  ]


def _diagnostics(seed, steps=12, tensors=5):
  rng = np.random.default_rng(seed)
  at = np.arange(1, steps + 1)
  return {
    "angle": (at, rng.uniform(0, 180, (steps, tensors))),
    "branch": (at, rng.integers(0, 3, (steps, tensors)).astype(float)),
  }


def _language_run(seed, method, utility):
  suite = {
    "retain": {"rouge": utility / 2},
    "forget": {"rouge": utility / 3},
    "model_utility": utility,
    "forget_quality": 10.0 ** (-20 * utility),
  }
  result = {split: {"accuracy": 0.5} for split in SPLITS} | {"suite": suite}
  return _run(seed, method__name=method, results={"unlearned": result})


def _assert_readable(figure):
  """No visible text leaves the figure or runs into another."""
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  renderer = canvas.get_renderer()
  texts = [figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
  for axis in figure.axes:
    texts += [axis.title, axis.xaxis.label, axis.yaxis.label]
    for side, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
      texts += [
        label
        for label, tick in zip(side.get_ticklabels(), side.get_ticklocs())
        if min(limits) <= tick <= max(limits)
      ]
  boxes = [
    (text.get_text(), text.get_window_extent(renderer))
    for text in texts
    if text.get_visible() and text.get_text()
  ]
  width, height = figure.get_size_inches() * figure.dpi
  for text, box in boxes:
    assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text
  for (first, a), (second, b) in itertools.combinations(boxes, 2):
    overlap_x = min(a.x1, b.x1) - max(a.x0, b.x0)
    overlap_y = min(a.y1, b.y1) - max(a.y0, b.y0)
    assert overlap_x <= 1 or overlap_y <= 1, f"{first!r} runs into {second!r}"


def _line(axis, label):
  """Of an error bar or a line."""
  found = dict(zip(*axis.get_legend_handles_labels()[::-1]))[label]
  return (found.lines[0] if hasattr(found, "has_yerr") else found).get_xydata()


# Trade-off


def test_tradeoff_shows_means_and_the_front_of_all():
  runs = [
    _run(1, unlearned=(0.9, 0.2, 0.9), method__name="a"),
    _run(2, unlearned=(0.7, 0.4, 0.9), method__name="a"),
    _run(1, unlearned=(0.95, 0.6, 0.9), method__name="b"),
    _run(1, unlearned=(0.5, 0.5, 0.9), method__name="c"),
  ]
  figure = report_plots.tradeoff(_study(*runs))
  (axis,) = figure.axes
  np.testing.assert_allclose(_line(axis, "a"), [[30, 80]])
  np.testing.assert_allclose(_line(axis, "retrained"), [[30, 95]])
  front = _line(axis, "Pareto front of all")
  np.testing.assert_allclose(front, [[30, 80], [60, 95]])
  _assert_readable(figure)


def test_tradeoff_keeps_problems_apart():
  runs = [*_sweep(), *_sweep(data__hard_probability=0.5)]
  figure = report_plots.tradeoff(_study(*runs))
  assert [axis.get_title() for axis in figure.axes] == ["hard_probability 0", "hard_probability 0.5"]
  # Both methods have a front of their own settings beside the one of all.
  assert all("Pareto front of all" in axis.get_legend_handles_labels()[1] for axis in figure.axes)
  _assert_readable(figure)


def test_tradeoff_of_language_models_is_of_what_they_say():
  runs = [
    _language_run(seed, method, value)
    for seed in (1, 2)
    for method, value in (("npo", 0.5), ("rmu", 0.1 * seed))
  ]
  figure = report_plots.tradeoff(_study(*runs))
  rouge, utility = figure.axes
  np.testing.assert_allclose(_line(rouge, "npo"), [[100 / 6, 25]])
  np.testing.assert_allclose(_line(utility, "rmu"), [[0.15, (1e-2 + 1e-4) / 2]])
  assert utility.get_yscale() == "log"
  _assert_readable(figure)


# Curves


def test_curves_run_over_the_constraint():
  runs = _sweep()
  figure = report_plots.curve(_study(*runs), "method.constraint_ratio")
  retain, forget, test, tug_of_war = figure.axes
  for axis, place, scale in ((retain, "retain", 100), (test, "test", 100)):
    expected = [
      [
        ratio,
        scale
        * np.mean(
          [
            run.values("unlearned")[f"{place}.accuracy"]
            for run in runs
            if run.config["method.constraint_ratio"] == ratio and run.config["method.name"] == "hamu-u"
          ]
        ),
      ]
      for ratio in (0.1, 0.5, 0.9)
    ]
    np.testing.assert_allclose(_line(axis, "hamu-u"), expected)
  assert _line(forget, "retrained")[:, 1].tolist() == [30, 30]
  assert "retrained" not in tug_of_war.get_legend_handles_labels()[1]
  _assert_readable(figure)


def test_a_setting_of_the_problem_moves_the_retrained_model():
  runs = [run for rho in (0.0, 0.5, 1.0) for run in _sweep(ratios=(0.1,), data__hard_probability=rho)]
  figure = report_plots.curve(_study(*runs), "data.hard_probability")
  assert len(figure.axes) == 4
  np.testing.assert_allclose(_line(figure.axes[0], "retrained"), [[0, 95], [0.5, 95], [1, 95]])
  _assert_readable(figure)


# Over steps


def test_angles_are_means_over_tensors_and_seeds():
  runs = [_run(seed, diagnostics=_diagnostics(seed)) for seed in (1, 2)]
  figure = report_plots.angle(_study(*runs))
  (axis,) = figure.axes
  expected = np.mean([run.diagnostics["angle"][1].mean(1) for run in runs], axis=0)
  np.testing.assert_allclose(_line(axis, "hamu-q"), np.c_[np.arange(1, 13), expected])
  _assert_readable(figure)


def test_branches_are_shares_of_all_tensors():
  rectified = float(BRANCHES.index("rectified"))
  direct = float(BRANCHES.index("direct"))
  steps = np.array([1, 2])
  runs = [
    _run(seed, diagnostics={"branch": (steps, np.array([[direct, direct], [direct, last]]))})
    for seed, last in ((1, direct), (2, rectified))
  ]
  figure = report_plots.branch(_study(*runs))
  (axis,) = figure.axes
  assert [text.get_text() for text in figure.legends[0].get_texts()] == ["direct", "rectified"]
  inside = [layer.get_paths()[0].contains_point((2, 80)) for layer in axis.collections]
  assert inside == [False, True]  # at step 2 three of four tensors go directly
  inside = [layer.get_paths()[0].contains_point((2, 70)) for layer in axis.collections]
  assert inside == [True, False]
  _assert_readable(figure)


# Bars


def test_bars_are_means_and_dots_are_seeds():
  runs = [
    _run(seed, unlearned=(1, 1, value), seconds=value * 4) for seed, value in ((1, 0.5), (2, 0.8), (3, 0.8))
  ]
  figure = report_plots.tug_of_war(_study(*runs))
  (axis,) = figure.axes
  assert [bar.get_width() for bar in axis.patches] == [pytest.approx(0.7)]
  (segment,) = [s for c in axis.collections for s in c.get_segments()]
  np.testing.assert_allclose(segment[:, 0], 0.7 + np.std([0.5, 0.8, 0.8], ddof=1) * np.array([-1, 1]))
  dots = [line.get_xdata() for line in axis.get_lines() if line.get_marker() == "o"]
  np.testing.assert_allclose(dots, [[0.5, 0.8, 0.8]])
  seconds, per_step = report_plots.timing(_study(*runs)).axes
  assert seconds.patches[0].get_width() == pytest.approx(2.8)
  assert per_step.patches[0].get_width() == pytest.approx(0.7)


# All of them


@pytest.mark.parametrize(
  "methods, levels", ((("hamu-q",), ("high",)), ([f"scrub_distill{i}" for i in range(12)], ("high", "mid")))
)
def test_few_and_many_are_readable(methods, levels):
  study = _study(
    *(
      run._replace(diagnostics=_diagnostics(1))
      for level in levels
      for run in _sweep(methods, (0.1, 0.25), (1,), data__memorization_level=level)
    )
  )
  study = study._replace(label="parquet, uoft-cs/cifar10, train_size 2000, test_size 1000, image_size 224")
  for draw in (report_plots.tradeoff, report_plots.tug_of_war, report_plots.angle):
    _assert_readable(draw(study))
  _assert_readable(report_plots.curve(study, "method.constraint_ratio"))


def test_nothing_to_show_is_no_figure(tmp_path):
  unfinished = _run()._replace(summary=None)
  assert report_plots.draw(_study(unfinished), tmp_path) == []
  without_reference = _run(results={"unlearned": {"retain": {"accuracy": 1.0}}})
  pictures = report_plots.draw(_study(without_reference), tmp_path)
  assert [picture.name for picture in pictures] == ["timing"]


def test_a_diverged_run_has_no_place():
  diverged = _run(method__name="ga", results={"unlearned": {split: {"accuracy": None} for split in SPLITS}})
  assert report_plots.tradeoff(_study(diverged)) is None
  figure = report_plots.tradeoff(_study(diverged, _run()))
  assert "ga" not in figure.axes[0].get_legend_handles_labels()[1]


def test_files_are_whole(tmp_path):
  study = _study(*(run._replace(diagnostics=_diagnostics(1)) for run in _sweep(("hamu-q",))))
  pictures = report_plots.draw(study, tmp_path)
  assert [picture.name for picture in pictures] == [
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
