"""What the pictures of a geometry show, read back from their axes; and that no text overlaps."""

import numpy as np
import pytest
from PIL import Image

from hamu_jax.analysis import geometry_plots
from hamu_jax.errors import UserError
from hamu_jax.paired import Paired
from hamu_jax.report import drawing
from tests.readable import assert_readable

COORDINATES = np.linspace(-1, 1, 5)
ROLES = ("retain", "forget", "test")
TITLES = ("before: original", "after: unlearned")


@pytest.fixture
def figures(monkeypatch):
  """The figures that are drawn, in order, kept from the disk."""
  drawn = []
  monkeypatch.setattr(drawing, "save", lambda figure, *paths: drawn.append(figure))
  return drawn


def _places():
  rng = np.random.default_rng(0)
  return {title: Paired(rng.normal(size=(30, 2)), 5 + rng.normal(size=(8, 2))) for title in TITLES}


def _grids(factor=1.0):
  """Losses of 0.1 in the middle and `factor` times 1 to 5 elsewhere."""

  def grid(seed):
    losses = factor * np.random.default_rng(seed).uniform(1, 5, (5, 5))
    losses[2, 2] = 0.1
    return losses

  return {
    title: {role: grid(index + 7 * row) for row, role in enumerate(ROLES)}
    for index, title in enumerate(TITLES)
  }


def _pictures(figure):
  """Axes with a title: surfaces and contours in turn, the models of one set after the other."""
  return [axis for axis in figure.axes if axis.get_title()]


def _labels(places):
  """Three classes in turn."""
  return Paired(*(np.arange(len(role)) % 3 for role in next(iter(places.values()))))


def test_umap_shows_both_sets_of_every_model_on_common_axes(figures):
  places = _places()
  geometry_plots.umap(places, _labels(places), "x")
  (figure,) = figures
  axes = _pictures(figure)
  assert [axis.get_title() for axis in axes] == list(TITLES)
  for axis, sets in zip(axes, places.values()):
    points = {points.get_label(): points for points in axis.collections}
    np.testing.assert_array_equal(points["retain"].get_offsets(), sets.retain)
    np.testing.assert_array_equal(points["forget"].get_offsets(), sets.forget)
    # A colour for each class, the same in both sets.
    for role in ("retain", "forget"):
      colours = points[role].get_facecolors()[:, :3]
      assert len(np.unique(colours, axis=0)) == 3
      np.testing.assert_array_equal(colours[::3], np.broadcast_to(colours[0], colours[::3].shape))
    # Told apart without colour too.
    shapes = [points[role].get_paths()[0].vertices.shape for role in ("retain", "forget")]
    assert shapes[0] != shapes[1]
  assert axes[0].get_xlim() == axes[1].get_xlim() and axes[0].get_ylim() == axes[1].get_ylim()
  assert_readable(figure)


def test_landscapes_show_every_grid_on_the_scale_of_its_row(figures):
  grids = _grids()
  geometry_plots.landscapes(COORDINATES, grids, "x")
  (figure,) = figures
  pictures = _pictures(figure)
  assert [axis.get_title() for axis in pictures] == [
    f"{role} loss, {title}" for role in ROLES for title in TITLES for _ in "sc"
  ]
  for row, role in enumerate(ROLES):
    losses = [sets[role] for sets in grids.values()]
    low, high = np.min(losses), np.max(losses)
    for model in range(2):
      surface, contours = pictures[4 * row + 2 * model : 4 * row + 2 * model + 2]
      assert surface.get_zlim() == pytest.approx((low, high))
      assert contours.collections[0].get_clim() == pytest.approx((low, high))
      assert contours.collections[0].levels[[0, -1]] == pytest.approx((low, high))
      assert surface.get_xlabel() == contours.get_xlabel() == "first direction"
      (cross,) = contours.get_lines()
      np.testing.assert_array_equal(cross.get_xydata(), [[0, 0]])
  assert_readable(figure)


def test_the_first_direction_runs_to_the_right(figures):
  """Losses that grow with the first coordinate alone have upright contours."""
  growing = 3 + np.tile(COORDINATES, (5, 1))
  geometry_plots.landscapes(COORDINATES, {"model": {"retain": growing}}, "x")
  surface, contours = _pictures(figures[0])[:2]
  lines = [path.vertices for path in contours.collections[1].get_paths() if len(path.vertices)]
  assert lines and all(np.ptp(line[:, 0]) < 1e-9 and np.ptp(line[:, 1]) > 1 for line in lines)
  # The mean height of each piece of the surface, row by row.
  pieces = surface.collections[0].get_array().reshape(4, 4)
  np.testing.assert_allclose(pieces, np.tile([2.25, 2.75, 3.25, 3.75], (4, 1)))


def test_losses_of_many_magnitudes_are_drawn_by_their_logarithm(figures):
  geometry_plots.landscapes(COORDINATES, _grids(factor=1000.0), "x")
  surface, contours = _pictures(figures[0])[:2]
  assert surface.get_zlim()[0] == pytest.approx(-1)
  assert contours.collections[0].get_clim()[0] == pytest.approx(-1)
  bars = [axis for axis in figures[0].axes if axis.get_ylabel() == "nats"]
  assert [bar.get_yscale() for bar in bars] == ["log"] * 3
  assert bars[0].get_ylim()[0] == pytest.approx(0.1)
  assert_readable(figures[0])


@pytest.mark.parametrize("factor, low", ((1.0, 1e-3), (1e-6, 5e-8)))
def test_a_logarithm_starts_where_losses_matter(figures, factor, low):
  """A loss of zero has none; what is drawn of tiny losses are at least two magnitudes."""
  losses = np.full((5, 5), 5 * factor)
  losses[0, 0] = 0
  geometry_plots.landscapes(COORDINATES, {"model": {"retain": losses}}, "x")
  surface, contours = _pictures(figures[0])[:2]
  limits = np.log10([low, 5 * factor])
  assert surface.get_zlim() == pytest.approx(limits)
  assert contours.collections[0].get_clim() == pytest.approx(limits)


def test_losses_that_are_not_finite_are_left_blank(figures):
  grids = _grids()
  grids[TITLES[1]]["test"][0, :2] = np.inf, np.nan
  geometry_plots.landscapes(COORDINATES, grids, "x")
  low, high = _pictures(figures[0])[-1].collections[0].get_clim()
  assert 0.1 <= low < high <= 5
  assert_readable(figures[0])


def test_a_constant_loss_can_be_drawn(figures):
  constant = np.full((5, 5), 2.0)
  geometry_plots.landscapes(COORDINATES, {"model": {"retain": constant, "forget": 0 * constant}}, "x")
  assert_readable(figures[0])


def test_files_are_whole_and_the_same_for_the_same_numbers(tmp_path):
  geometry_plots.umap(_places(), _labels(_places()), tmp_path / "first")
  geometry_plots.umap(_places(), _labels(_places()), tmp_path / "second")
  for kind in ("png", "pdf"):
    assert (tmp_path / f"first.{kind}").read_bytes() == (tmp_path / f"second.{kind}").read_bytes()
  assert (tmp_path / "first.pdf").read_bytes().startswith(b"%PDF")
  with Image.open(tmp_path / "first.png") as image:
    image.verify()
    assert min(image.size) > 400
  with pytest.raises(UserError, match="cannot write"):
    geometry_plots.umap(_places(), _labels(_places()), tmp_path / "missing" / "picture")
