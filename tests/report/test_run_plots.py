"""What the pictures show, read back from their axes; and that no text runs into another."""

import numpy as np
import pytest
from PIL import Image

from hamu_jax.errors import UserError
from hamu_jax.report import drawing
from hamu_jax.report import run_plots as plots
from hamu_jax.run.rundir import jsonable
from hamu_jax.transforms import BRANCHES
from tests.readable import assert_readable, texts

DIRECT, RECTIFIED, ZERO_FORGET = (
  BRANCHES.index(name) for name in ("direct", "rectified", "zero_forget_grad")
)
REFERENCES = {
  name: {split: {"accuracy": accuracy, "loss": 1.0} for split in ("retain", "forget", "test")}
  for name, accuracy in (("original", 0.9), ("retrained", 0.25), ("unlearned", 0.5))
}


@pytest.fixture
def figures(monkeypatch):
  """The figures that are drawn, in order, kept from the disk."""
  drawn = []
  monkeypatch.setattr(drawing, "save", lambda figure, *paths: drawn.append(figure))
  return drawn


def _step_rows(steps, tensors, seed=0):
  rng = np.random.default_rng(seed)
  return jsonable(
    [
      {
        "stage": "unlearn",
        "step": step,
        "split": "step",
        "retain_loss": 0.1,
        "angle": rng.uniform(0, 180, tensors),
        "branch": rng.integers(0, 3, tensors),
        "feasibility": rng.uniform(0.1, 0.9, tensors),
        "stopping_margin": -1e-6 * step,
        "stopping_met": False,
      }
      for step in range(1, steps + 1)
    ]
  )


def _evaluation_rows(steps):
  return [
    {"stage": "unlearn", "step": step, "split": split, "accuracy": accuracy, "loss": loss}
    for step in steps
    for split, accuracy, loss in (
      ("retain", 1 - step / 1000, 0.01),
      ("forget", 1 / (1 + step), 0.01 + step),
      ("test", 0.9, 0.4),
    )
  ]


def _names(tensors):
  return [f"encoder.stage{i // 21}.block{i % 21 // 7}.layer{i % 7}.kernel" for i in range(tensors)]


def _axis(figure, title):
  (axis,) = [axis for axis in figure.axes if axis.get_title().startswith(title)]
  return axis


# Trade-off


def test_tradeoff_walks_the_evaluations(figures):
  other = [{"stage": "pretrain", "step": 3, "split": "retain", "accuracy": 0.1, "loss": 9.0}]
  plots.tradeoff(other + _evaluation_rows([20, 0, 10]), "x", references=REFERENCES, title="hamu-q")
  (figure,) = figures
  plane = _axis(figure, "Retain against forget")
  x, y = plane.get_lines()[0].get_data()
  np.testing.assert_allclose(x, [100, 100 / 11, 100 / 21])
  np.testing.assert_allclose(y, [100, 99, 98])
  points = {c.get_label(): c.get_offsets() for c in plane.collections}
  np.testing.assert_allclose(points["end (step 20)"], [[100 / 21, 98]])
  np.testing.assert_allclose(points["original"], [[90, 90]])
  np.testing.assert_allclose(points["retrained (the target)"], [[25, 25]])
  assert "unlearned" not in points


def test_a_run_that_evaluates_its_end_alone_begins_at_the_original_model(figures):
  plots.tradeoff(_evaluation_rows([20]), "x", references=REFERENCES)
  plane, accuracy = (_axis(figures[0], title) for title in ("Retain against forget", "Accuracy"))
  np.testing.assert_allclose(plane.get_lines()[0].get_xydata(), [[90, 90], [100 / 21, 98]])
  lines = {line.get_label(): line for line in accuracy.get_lines()}
  np.testing.assert_allclose(lines["forget"].get_xydata(), [[0, 90], [20, 100 / 21]])
  # No share of examples is negative.
  assert all(
    tick >= 0 for axis in (plane, accuracy) for tick in axis.get_yticks() if tick >= axis.get_ylim()[0]
  )


def test_tradeoff_draws_accuracy_and_loss_with_the_retrained_level(figures):
  plots.tradeoff(_evaluation_rows([0, 5, 50]), "x", references=REFERENCES)
  accuracy, loss = (_axis(figures[0], title) for title in ("Accuracy", "Loss"))
  lines = {line.get_label(): line for line in accuracy.get_lines()}
  np.testing.assert_allclose(lines["forget"].get_xydata(), [[0, 100], [5, 100 / 6], [50, 100 / 51]])
  levels = [line.get_ydata() for line in accuracy.get_lines() if line.get_linestyle() == ":"]
  assert [25.0, 25.0] in [list(level) for level in levels]
  lines = {line.get_label(): line for line in loss.get_lines()}
  np.testing.assert_allclose(lines["forget"].get_ydata(), [0.01, 5.01, 50.01])
  assert loss.get_yscale() == "log"


@pytest.mark.parametrize("steps", ([0], [0, 1], [0, 1, 2, 3], range(0, 1001, 5)))
@pytest.mark.parametrize("references", (None, REFERENCES, {"original": REFERENCES["original"]}))
def test_tradeoff_is_readable(figures, steps, references):
  plots.tradeoff(_evaluation_rows(steps), "x", references=references, title="hamu-q on digits")
  assert_readable(figures[0])


def test_tradeoff_without_evaluations_says_so(figures):
  plots.tradeoff(_step_rows(3, 2), "x")
  assert "no evaluations in this run" in [text for text, _ in texts(figures[0])]


def test_tradeoff_survives_a_diverged_run(figures):
  rows = _evaluation_rows([0, 10])
  for row in rows[3:]:
    row["loss"] = None
  plots.tradeoff(rows, "x")
  lines = {line.get_label(): line for line in _axis(figures[0], "Loss").get_lines()}
  np.testing.assert_array_equal(lines["retain"].get_ydata(), [0.01, np.nan])


# Alignment


def test_alignment_draws_every_diagnostic(figures):
  rows = _step_rows(12, 5)
  plots.alignment(rows, "x", names=_names(5), title="hamu-q")
  (figure,) = figures
  angles = np.array([row["angle"] for row in rows])

  heat_map = _axis(figure, "Angle between retain and forget gradient")
  np.testing.assert_allclose(heat_map.collections[0].get_array(), angles.T)
  assert [t.get_text() for t in heat_map.get_yticklabels()] == [f"layer{i}" for i in range(5)]
  low, high = heat_map.get_ylim()
  assert low > high  # the first tensor is on top

  mean = _axis(figure, "Mean angle").get_lines()[0]
  np.testing.assert_allclose(mean.get_xydata(), np.c_[np.arange(1, 13), angles.mean(1)])

  feasibility = _axis(figure, "Largest feasibility").get_lines()[0].get_ydata()
  np.testing.assert_allclose(feasibility, [max(row["feasibility"]) for row in rows])

  margin = _axis(figure, "Aggregate stopping margin").get_lines()[0].get_ydata()
  np.testing.assert_allclose(margin, [row["stopping_margin"] for row in rows])


def test_alignment_stacks_the_branches(figures):
  codes = [[DIRECT, DIRECT, DIRECT, RECTIFIED], [DIRECT, RECTIFIED, RECTIFIED, ZERO_FORGET]]
  rows = _step_rows(2, 4)
  for row, code in zip(rows, codes):
    row["branch"] = code
  plots.alignment(rows, "x")
  axis = _axis(figures[0], "Branch")
  assert [t.get_text() for t in axis.get_legend().get_texts()] == ["direct", "rectified", "zero forget grad"]
  # The bottom and top of each layer over step 1 and over step 2.
  extents = (((0, 75), (0, 25)), ((75, 100), (25, 75)), ((100, 100), (75, 100)))
  for layer, over_steps in zip(axis.collections, extents, strict=True):
    for step, (bottom, top) in zip((1, 2), over_steps):
      for height in range(2, 100, 10):
        inside = layer.get_paths()[0].contains_point((step, height))
        assert inside == (bottom < height < top)


def test_alignment_marks_steps_without_any_feasible_length(figures):
  rows = _step_rows(3, 2)
  rows[1]["feasibility"] = [0.5, None]
  plots.alignment(rows, "x")
  axis = _axis(figures[0], "Largest feasibility")
  assert "infinite" in axis.get_title()
  line, _, marks = axis.get_lines()
  assert np.isnan(line.get_ydata()[1]) and np.isfinite(line.get_ydata()[[0, 2]]).all()
  assert list(marks.get_xdata()) == [2]


@pytest.mark.parametrize("steps", (1, 2, 30, 400))
@pytest.mark.parametrize("tensors", (1, 2, 65, 448))
def test_alignment_is_readable(figures, steps, tensors):
  plots.alignment(_step_rows(steps, tensors), "x", names=_names(tensors), title="hamu-q on digits")
  assert_readable(figures[0])


def test_alignment_leaves_out_what_the_method_has_not(figures):
  rows = [{name: row[name] for name in ("stage", "step", "split", "angle")} for row in _step_rows(8, 6)]
  plots.alignment(rows, "x", names=_names(6), title="gru")
  assert [axis.get_title() for axis in figures[0].axes if axis.get_title()] == [
    "Angle between retain and forget gradient",
    "Mean angle over tensors ± standard deviation",
  ]
  assert_readable(figures[0])


def test_alignment_without_diagnostics_says_so(figures):
  plots.alignment(_evaluation_rows([0, 1]), "x")
  assert "no per-step diagnostics in this run" in [text for text, _ in texts(figures[0])]


def test_alignment_survives_a_step_that_is_not_finite(figures):
  rows = _step_rows(4, 3)
  rows[-1] |= {
    "angle": [None] * 3,
    "feasibility": [None] * 3,
    "stopping_margin": None,
    "branch": [BRANCHES.index("nonfinite")] * 3,
  }
  plots.alignment(rows, "x")
  mean = _axis(figures[0], "Mean angle").get_lines()[0].get_ydata()
  assert np.isnan(mean[-1]) and np.isfinite(mean[:-1]).all()
  assert_readable(figures[0])


def test_names_lose_what_all_share_and_stay_readable():
  assert drawing.short_names(["a.b.0.q.w", "a.b.1.k.w"]) == ["0.q", "1.k"]
  assert drawing.short_names(["head", "head"]) == ["head", "head"]
  assert drawing.short_names(["a.w"]) == ["w"]
  (name, _) = drawing.short_names(["x" * 30 + "y" * 30, "z"])
  assert len(name) == 40 and name.startswith("xxx") and name.endswith("yyy") and "…" in name


# Files


@pytest.mark.parametrize("draw", (plots.tradeoff, plots.alignment))
def test_files_are_whole_pngs(tmp_path, draw):
  path = tmp_path / "picture.png"
  draw(_step_rows(3, 4) + _evaluation_rows([0, 3]), path)
  with Image.open(path) as image:
    image.verify()
    assert image.format == "PNG" and min(image.size) > 400
  with pytest.raises(UserError, match="cannot write"):
    draw([], tmp_path / "missing" / "picture.png")
