"""The tables of made-up run directories."""

import numpy as np

from hamu_jax.run import rundir
from tests.report import reported


def test_results_are_means_and_deviations_in_percent(runs):
  table = reported.tables(runs)["results"]
  assert table.header == (
    "method",
    "seeds",
    "tug of war",
    "retain distance %",
    "forget distance %",
    "retain acc %",
    "forget acc %",
    "test acc %",
    "unseen % MIA",
  )
  assert [row[0] for row in table.rows] == ["original", "retrained", "ft", "hamu-q"]
  column = table.header.index
  cell = table.rows[3][column("forget acc %")]
  values = np.array([50, 60, 90])
  np.testing.assert_allclose(cell.estimate, [values.mean(), values.std(ddof=1), 3])
  assert cell.text() == "66.67 ± 20.82"
  assert table.rows[2][column("forget acc %")].text() == "25.00"  # one seed has no deviation
  assert table.rows[1][column("tug of war")] is None  # nor has the retrained model a tug-of-war
  best = table.rows[1][column("forget acc %")].estimate.mean
  distance = table.rows[3][column("forget distance %")].estimate
  np.testing.assert_allclose(distance[:2], [np.abs(values - best).mean(), np.abs(values - best).std(ddof=1)])
  assert table.rows[1][column("forget distance %")] is None


def test_language_models_have_their_own_columns(tmp_path):
  suite = {
    "retain": {"rouge": 0.5, "probability": 0.25},
    "forget": {"rouge": 0.125, "truth_ratio": 0.75},
    "real_authors": {"rouge": 0.375},
    "model_utility": 0.5,
    "forget_quality": 1e-9,
    "watermark": {"forget_retain_auc": 0.625},
  }
  found = reported.tables(reported.write(tmp_path / "run", suite=suite))
  cells = dict(zip(found["results"].header, found["results"].rows[-1]))
  assert cells["retain ROUGE %"].text() == "50.00" and cells["model utility"].text() == "0.5000"
  assert cells["forget quality"].text() == "1.00e-09" and cells["watermark AUC"].text() == "0.6250"
  assert found["language"].header[2:] == (
    "retain ROUGE %",
    "forget ROUGE %",
    "real authors ROUGE %",
    "retain probability",
    "forget truth ratio",
    "watermark forget retain auc",
  )
  assert len(found["language"].rows) == 1  # only the unlearned model has such scores
  assert "language" not in reported.tables(reported.write(tmp_path / "other"))


def test_deviations_are_there_where_several_seeds_change(runs, tmp_path):
  assert "deviations" not in reported.tables(runs)
  for seed in (41, 42):
    for unlearning in (1, 2):
      values = (0.9, 0.1 * seed - 4 + 0.3 * (unlearning == 2), 0.5)
      reported.write(tmp_path / f"{seed}-{unlearning}", values=values, seed=seed, unlearning_seed=unlearning)
  table = reported.tables(tmp_path)["deviations"]
  place = table.header.index("forget acc %")
  assert [(row[0], row[1], row[place].text()) for row in table.rows] == [
    ("hamu-q", "method.seed", "21.21"),
    ("hamu-q", "seed", "7.07"),
  ]


def test_runs_of_several_devices_are_timed_apart(tmp_path):
  for seed, device in ((1, "cpu"), (2, "cpu"), (3, "TPU v4")):
    path = reported.write(tmp_path / str(seed), seed=seed)
    summary = rundir.read_json(path / "summary.json")
    summary["provenance"]["device"] = device
    rundir.write_json(path / "summary.json", summary)
  table = reported.tables(tmp_path)["timing"]
  assert [row[1:3] for row in table.rows] == [("1 x cpu", "2"), ("1 x TPU v4", "1")]
  assert table.header[3:] == ("pretrain s", "unlearn s", "steps", "s a step")
  assert [cell.estimate.mean for cell in table.rows[0][3:]] == [3, 2, 4, 0.5]


def test_runs_that_shared_a_program_are_timed_apart(tmp_path):
  for seed, together in ((1, {}), (2, {"unlearn": 8}), (3, {"pretrain": 8})):
    path = reported.write(tmp_path / str(seed), seed=seed)
    summary = rundir.read_json(path / "summary.json")
    summary["provenance"]["together"] = together
    rundir.write_json(path / "summary.json", summary)
  found = [row[1:3] for row in reported.tables(tmp_path)["timing"].rows]
  assert found == [("1 x cpu", "2"), ("1 x cpu, 8 models together", "1")]


def test_every_run_is_listed_with_its_status(runs):
  table = reported.tables(runs)["runs"]
  status = {row[0].rsplit("/", 1)[-1]: row[table.header.index("status")] for row in table.rows}
  assert status == {
    "ft": "finished",
    "half": "unfinished: unlearn step 3",
    "q1": "finished",
    "q2": "finished",
    "q3": "finished",
  }


def test_what_else_differs_is_under_settings(tmp_path):
  reported.write(tmp_path / "a", method="ft", ratio=0.1)
  reported.write(tmp_path / "b", method="hamu-q", ratio=0.5)
  found = reported.tables(tmp_path)
  assert found["results"].header[:2] == ("method", "seeds")
  assert found["settings"].header == ("method", "constraint_ratio")
  # `ft` has no constraint.
  assert found["settings"].rows == (("ft", None), ("hamu-q", "0.5"))
