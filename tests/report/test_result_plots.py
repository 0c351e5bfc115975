"""Trade-offs and curves, read back from their axes; Pareto fronts against brute force."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hamu_jax.report import result_plots
from tests.readable import assert_readable
from tests.report import cases


def test_distances_show_means_and_the_front_of_all():
  runs = [
    cases.run(1, unlearned=(0.9, 0.2, 0.9), method__name="a"),
    cases.run(2, unlearned=(0.7, 0.4, 0.9), method__name="a"),
    cases.run(1, unlearned=(0.95, 0.6, 0.9), method__name="b"),
    cases.run(1, unlearned=(0.5, 0.5, 0.9), method__name="c"),
  ]
  figure = result_plots.distances(cases.study(*runs))
  (axis,) = figure.axes
  # The retrained model has 95 % and 30 %. Deviations on both sides do not cancel.
  np.testing.assert_allclose(cases.line(axis, "a"), [[10, 15]])
  np.testing.assert_allclose(cases.line(axis, "c"), [[20, 45]])
  np.testing.assert_allclose(cases.line(axis, "retrained"), [[0, 0]])
  front = cases.line(axis, "Pareto front of all")
  np.testing.assert_allclose(front, [[10, 15], [30, 0]], atol=1e-9)
  assert "lower is better" in axis.get_xlabel() and "lower is better" in axis.get_ylabel()
  assert_readable(figure)


def test_the_papers_axes_have_the_retrained_model_and_no_front():
  runs = [cases.run(1, unlearned=(0.9, 0.2, 0.9), method__name="a"), cases.run(1, method__name="b")]
  figure = result_plots.tradeoff(cases.study(*runs))
  (axis,) = figure.axes
  np.testing.assert_allclose(cases.line(axis, "a"), [[20, 90]])
  np.testing.assert_allclose(cases.line(axis, "retrained"), [[30, 95]])
  assert "Pareto front of all" not in axis.get_legend_handles_labels()[1]
  assert "better" not in axis.get_xlabel() and "paper's axes" in figure.get_suptitle()
  assert_readable(figure)


def test_distances_keep_tasks_apart():
  runs = [*cases.sweep(), *cases.sweep(data__hard_probability=0.5)]
  figure = result_plots.distances(cases.study(*runs))
  assert [axis.get_title() for axis in figure.axes] == ["hard_probability 0", "hard_probability 0.5"]
  # Both methods have a front of their own settings beside the one of all.
  assert all("Pareto front of all" in axis.get_legend_handles_labels()[1] for axis in figure.axes)
  assert_readable(figure)


def test_tradeoff_of_language_models_is_of_what_they_say():
  runs = [
    cases.language_run(seed, method, value)
    for seed in (1, 2)
    for method, value in (("npo", 0.5), ("rmu", 0.1 * seed))
  ]
  figure = result_plots.distances(cases.study(*runs))
  rouge, utility = figure.axes
  np.testing.assert_allclose(cases.line(rouge, "npo"), [[20 / 3, 15]])
  np.testing.assert_allclose(cases.line(utility, "rmu"), [[0.15, (1e-2 + 1e-4) / 2]])
  (papers,) = result_plots.tradeoff(cases.study(*runs)).axes
  np.testing.assert_allclose(cases.line(papers, "npo"), [[100 / 6, 25]])
  assert utility.get_yscale() == "log"
  assert_readable(figure)


def test_curves_run_over_the_constraint():
  runs = cases.sweep()
  figure = result_plots.curve(cases.study(*runs), "method.constraint_ratio")
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
    np.testing.assert_allclose(cases.line(axis, "hamu-u"), expected)
  assert cases.line(forget, "retrained")[:, 1].tolist() == [30, 30]
  assert "retrained" not in tug_of_war.get_legend_handles_labels()[1]
  assert_readable(figure)


def test_a_task_field_moves_the_retrained_model():
  runs = [run for rho in (0.0, 0.5, 1.0) for run in cases.sweep(ratios=(0.1,), data__hard_probability=rho)]
  figure = result_plots.curve(cases.study(*runs), "data.hard_probability")
  assert len(figure.axes) == 4
  np.testing.assert_allclose(cases.line(figure.axes[0], "retrained"), [[0, 95], [0.5, 95], [1, 95]])
  assert_readable(figure)


def test_a_diverged_run_has_no_place():
  diverged = cases.run(
    method__name="ga", results={"unlearned": {split: {"accuracy": None} for split in cases.SPLITS}}
  )
  assert result_plots.tradeoff(cases.study(diverged)) is None
  figure = result_plots.tradeoff(cases.study(diverged, cases.run()))
  assert "ga" not in figure.axes[0].get_legend_handles_labels()[1]


@given(
  st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12),
  st.tuples(st.booleans(), st.booleans()),
)
def test_pareto_is_what_nothing_beats(points, larger):
  def gains(point):
    return [value if more else -value for value, more in zip(point, larger)]

  def beats(a, b):
    return all(x >= y for x, y in zip(gains(a), gains(b))) and gains(a) != gains(b)

  front = result_plots.pareto(np.array(points), larger=larger)
  expected = {i for i, point in enumerate(points) if not any(beats(other, point) for other in points)}
  assert set(front.tolist()) == expected and len(front) == len(expected)
  assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_pareto_leaves_out_what_is_not_finite():
  points = np.array([[np.nan, 9.0], [1.0, 1.0], [2.0, np.nan]])
  assert result_plots.pareto(points, larger=(False, True)).tolist() == [1]
  assert result_plots.pareto(np.zeros((0, 2)), larger=(True, True)).size == 0
