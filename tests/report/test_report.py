"""The report of made-up run directories: its tables in every format, its page, its command line."""

import csv
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest

from hamu_jax.config import default as config_lib
from hamu_jax.report import gather, report
from hamu_jax.run import rundir

SPLITS = ("retain", "forget", "test")


def _write(
  path,
  *,
  values=(1.0, 0.5, 0.75),
  method="hamu-q",
  seed=1,
  ratio=0.5,
  data="d" * 64,
  finished=True,
  torn="",
  suite=None,
  source="digits",
  unlearning_seed=None,
):
  """A run directory whose unlearned model has the given accuracies."""
  path.mkdir(parents=True)
  config = config_lib.default_config()
  config.data.source, config.seed, config.method.seed = source, seed, unlearning_seed
  config.method.name, config.method.constraint_ratio = method, ratio
  rundir.write_json(path / "config.json", config.to_dict())
  row = {"stage": "unlearn", "step": 3, "split": "step", "angle": [80.0, 100.0], "branch": [0, 1]}
  (path / "metrics.jsonl").write_text(json.dumps(row) + "\n" + torn)
  if finished:

    def result(accuracies):
      return {split: {"accuracy": value, "loss": 1e-6} for split, value in zip(SPLITS, accuracies)}

    unlearned = result(values) | {"tug_of_war": values[2], "membership": {"confidence": 0.25}}
    rundir.write_json(
      path / "summary.json",
      {
        "method": method,
        "steps": 4,
        "stop_reason": "finished | <b>after</b> 100% & more",
        "results": {
          "original": result((1, 1, 1)),
          "retrained": result((1, 0, 1)),
          "unlearned": unlearned | ({"suite": suite} if suite else {}),
        },
        "seconds": {"pretrain": 3.0, "unlearn": 2.0},
        "provenance": {"device": "cpu", "devices": 1, "data_fingerprint": data},
      },
    )
  return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """hamu-q of three seeds, ft of one with a torn line, and a half-finished ga."""
  folder = tmp_path_factory.mktemp("runs")
  for seed, value in ((1, 0.5), (2, 0.6), (3, 0.9)):
    _write(folder / f"q{seed}", values=(1.0, value, value), seed=seed)
  _write(folder / "ft", method="ft", values=(0.5, 0.25, 0.125), torn='{"stage": "unl')
  _write(folder / "half", method="ga", finished=False)
  return folder


@pytest.fixture(scope="module")
def out(runs, tmp_path_factory):
  """The report of these runs."""
  folder = tmp_path_factory.mktemp("out")
  assert _run(runs, f"--out={folder}") == 0
  return folder


def _tables(*paths):
  (study,) = gather.studies(gather.gather(paths).runs)
  return {table.name: table for table in report.tables(study)}


def _run(*arguments):
  return report.run(["report", *map(str, arguments)])


class _Page(html.parser.HTMLParser):
  """The cells, links, sources and tags of a page."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.sources, self.links, self.ids, self.rows = [], [], [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.tags.append(tag)
    self.sources += [attributes[name] for name in ("src", "srcset", "data") if name in attributes]
    self.links += [attributes["href"]] if "href" in attributes else []
    self.ids += [attributes["id"]] if "id" in attributes else []
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")

  def handle_data(self, data):
    if self.rows and self.rows[-1]:
      self.rows[-1][-1] += data


# Tables


def test_results_are_means_and_deviations_in_percent(runs):
  table = _tables(runs)["results"]
  assert table.header == (
    "method",
    "seeds",
    "retain acc %",
    "forget acc %",
    "test acc %",
    "unseen % MIA",
    "tug of war",
  )
  assert [row[0] for row in table.rows] == ["original", "retrained", "ft", "hamu-q"]
  cell = table.rows[3][3]
  values = np.array([50, 60, 90])
  np.testing.assert_allclose(cell.estimate, [values.mean(), values.std(ddof=1), 3])
  assert cell.text() == "66.67 ± 20.82"
  assert table.rows[2][3].text() == "25.00"  # one seed has no deviation
  assert table.rows[1][6] is None  # nor has the retrained model a tug-of-war


def test_language_models_have_their_own_columns(tmp_path):
  suite = {
    "retain": {"rouge": 0.5, "probability": 0.25},
    "forget": {"rouge": 0.125, "truth_ratio": 0.75},
    "real_authors": {"rouge": 0.375},
    "model_utility": 0.5,
    "forget_quality": 1e-9,
    "watermark": {"forget_retain_auc": 0.625},
  }
  found = _tables(_write(tmp_path / "run", suite=suite))
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
  assert "language" not in _tables(_write(tmp_path / "other"))


def test_deviations_are_there_where_several_seeds_change(runs, tmp_path):
  assert "deviations" not in _tables(runs)
  for seed in (41, 42):
    for unlearning in (1, 2):
      values = (0.9, 0.1 * seed - 4 + 0.3 * (unlearning == 2), 0.5)
      _write(tmp_path / f"{seed}-{unlearning}", values=values, seed=seed, unlearning_seed=unlearning)
  table = _tables(tmp_path)["deviations"]
  assert table.header[:4] == ("method", "seed", "retain acc %", "forget acc %")
  assert [(row[0], row[1], row[3].text()) for row in table.rows] == [
    ("hamu-q", "method.seed", "21.21"),
    ("hamu-q", "seed", "7.07"),
  ]


def test_runs_of_several_devices_are_timed_apart(tmp_path):
  for seed, device in ((1, "cpu"), (2, "cpu"), (3, "TPU v4")):
    path = _write(tmp_path / str(seed), seed=seed)
    summary = rundir.read_json(path / "summary.json")
    summary["provenance"]["device"] = device
    rundir.write_json(path / "summary.json", summary)
  table = _tables(tmp_path)["timing"]
  assert [row[1:3] for row in table.rows] == [("1 x cpu", "2"), ("1 x TPU v4", "1")]
  assert table.header[3:] == ("pretrain s", "unlearn s", "steps", "s a step")
  assert [cell.estimate.mean for cell in table.rows[0][3:]] == [3, 2, 4, 0.5]


def test_runs_that_shared_a_program_are_timed_apart(tmp_path):
  for seed, together in ((1, {}), (2, {"unlearn": 8}), (3, {"pretrain": 8})):
    path = _write(tmp_path / str(seed), seed=seed)
    summary = rundir.read_json(path / "summary.json")
    summary["provenance"]["together"] = together
    rundir.write_json(path / "summary.json", summary)
  found = [row[1:3] for row in _tables(tmp_path)["timing"].rows]
  assert found == [("1 x cpu", "2"), ("1 x cpu, 8 models together", "1")]


def test_every_run_is_listed_with_its_status(runs):
  table = _tables(runs)["runs"]
  status = {row[0].rsplit("/", 1)[-1]: row[table.header.index("status")] for row in table.rows}
  assert status == {
    "ft": "finished",
    "half": "unfinished: unlearn step 3",
    "q1": "finished",
    "q2": "finished",
    "q3": "finished",
  }


def test_what_else_differs_is_under_settings(tmp_path):
  _write(tmp_path / "a", method="ft", ratio=0.1)
  _write(tmp_path / "b", method="hamu-q", ratio=0.5)
  found = _tables(tmp_path)
  assert found["results"].header[:2] == ("method", "seeds")
  assert found["settings"].header == ("method", "constraint_ratio")
  assert found["settings"].rows == (("ft", "0.1"), ("hamu-q", "0.5"))


# Formats


def test_markdown_has_one_line_a_row(runs):
  lines = report.markdown(_tables(runs)["runs"]).splitlines()
  assert len(lines) == 2 + 5
  assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
  assert r"finished \| <b>" in lines[2]
  lines = report.markdown(_tables(runs)["results"]).splitlines()
  assert lines[1].startswith("| --- | --- | ---: |")
  assert lines[5].startswith("| hamu-q | 3 | 100.00 ± 0.00 | 66.67 ± 20.82 |")


def test_csv_has_every_digit(runs):
  rows = list(csv.DictReader(io.StringIO(report.comma_separated(_tables(runs)["values"]))))
  row = rows[-1]
  assert row["method"] == "hamu-q"
  assert float(row["forget.accuracy mean"]) == np.mean([0.5, 0.6, 0.9])
  assert float(row["forget.accuracy std"]) == np.std([0.5, 0.6, 0.9], ddof=1)
  assert row["forget.accuracy n"] == "3"
  assert rows[2]["method"] == "ft" and rows[2]["forget.accuracy std"] == ""
  assert rows[1]["tug_of_war mean"] == ""


def test_latex_has_no_special_character_of_its_text(runs):
  text = report.latex(_tables(runs)["runs"])
  body = [line for line in text.splitlines()[1:] if line.endswith(r"\\")]
  assert len(body) == 1 + 5
  assert len({len(re.findall(r"(?<!\\)&", line)) for line in body}) == 1
  assert not re.search(r"(?<!\\)[%#_]", "\n".join(text.splitlines()[1:]))
  text = report.latex(_tables(runs)["results"])
  assert r"$66.67 \pm 20.82$" in text and r"retain acc \%" in text
  assert text.count("{") == text.count("}")
  assert r"$1.00\mathrm{e}{-}06 \pm" in report.latex(_tables(runs)["losses"])


def test_a_number_that_is_not_finite_is_a_word():
  number = report.Number(gather.Estimate(math.nan, math.nan, 2), 2)
  table = report.Table("a", "A", ("x",), ((number,),))
  assert "| nan |" in report.markdown(table)
  assert "  nan " in report.latex(table)
  assert report.comma_separated(table) == "x mean,x std,x n\nnan,nan,2\n"


# Page and command line


def test_the_page_needs_nothing_else(out):
  text = (out / "index.html").read_text()
  page = _Page(text)
  assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
  assert page.links and {link.removeprefix("#") for link in page.links} == set(page.ids)
  assert not re.search(r"https?:|url\(|@import|<script|<link", text)
  assert "b" not in page.tags  # the text of a run is no markup
  assert [row[3] for row in page.rows if row[0] == "hamu-q" and len(row) > 3][0] == "66.67 ± 20.82"
  assert "unfinished: unlearn step 3" in [cell for row in page.rows for cell in row]


def test_the_folder_has_every_format(out):
  names = {path.name for path in out.iterdir()}
  tables = {"results", "losses", "timing", "runs"}
  figures = {"tradeoff", "tug_of_war", "angle", "branch", "timing"}
  assert names == {
    "index.html",
    "report.md",
    "values.csv",
    *(f"{name}.{kind}" for name in tables for kind in ("csv", "tex")),
    *(f"{name}.{kind}" for name in figures for kind in ("png", "pdf")),
  }
  text = (out / "report.md").read_text()
  assert {name for name in re.findall(r"!\[.*\]\((.*)\)", text)} == {f"{name}.png" for name in figures}


def test_mixed_data_are_refused_in_one_line(runs, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(report.report_plots, "draw", lambda study, folder: [])
  _write(tmp_path / "other", data="e" * 64, source="tfds")
  arguments = (runs, tmp_path / "other", f"--out={tmp_path / 'out'}")
  assert _run(*arguments) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and "config.data.source is 'digits' there and 'tfds' here" in error
  assert not (tmp_path / "out").exists()
  assert _run(*arguments, "--by-dataset") == 0
  page = _Page((tmp_path / "out" / "index.html").read_text())
  assert page.tags.count("section") == 2
  folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
  assert folders == {"digits", "tfds-uoft-cs-cifar10"}
  assert (tmp_path / "out" / "digits" / "results.csv").exists()


def test_a_truncated_file_is_reported_and_the_rest_used(runs, out, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(report.report_plots, "draw", lambda study, folder: [])
  assert _run(runs, "--out", tmp_path) == 0
  told = capsys.readouterr()
  note = "metrics.jsonl is truncated: its 1 whole lines are used"
  assert told.err.count("\n") == 1 and note in told.err
  assert "5 runs, 1 of them unfinished" in told.out
  assert note in (out / "index.html").read_text() and note in (out / "report.md").read_text()


@pytest.mark.parametrize(
  "arguments, said",
  (
    (("RUNS",), "required: --out"),
    (("--out=OUT",), "required: runs"),
    (("RUNS/missing", "--out=OUT"), "missing: no such folder"),
    (("RUNS", "--out=RUNS/ft/config.json/x"), "config.json/x: Not a directory; choose another folder"),
    (("RUNS", "--out=OUT", "--by-data"), "--by-data"),
  ),
)
def test_bad_input_is_one_line(runs, tmp_path, capsys, arguments, said):
  names = {"RUNS": str(runs), "OUT": str(tmp_path / "out")}
  arguments = [re.sub("RUNS|OUT", lambda match: names[match[0]], argument) for argument in arguments]
  assert _run(*arguments) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1 and said in error


@pytest.mark.slow
def test_a_real_run_is_reported(small, tmp_path):
  from hamu_jax import main

  for seed in (1, 2):
    assert main.run(small(f"run{seed}", f"--config.seed={seed}")) == 0
  assert _run(*(tmp_path / f"run{seed}" for seed in (1, 2)), f"--out={tmp_path / 'out'}") == 0
  (row,) = [
    row for row in csv.DictReader((tmp_path / "out" / "values.csv").open()) if row["method"] == "hamu-q"
  ]
  accuracies = [
    rundir.read_json(tmp_path / f"run{seed}" / "summary.json")["results"]["unlearned"]["test"]["accuracy"]
    for seed in (1, 2)
  ]
  assert row["seeds"] == "2" and float(row["test.accuracy mean"]) == pytest.approx(np.mean(accuracies))
  assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
    "tradeoff.png",
    "tug_of_war.png",
    "angle.png",
    "branch.png",
    "timing.png",
  }
