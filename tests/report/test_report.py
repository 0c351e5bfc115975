"""The report of made-up run directories: its files, its page, its command line."""

import csv
import html.parser
import re

import numpy as np
import pytest

from hamu_jax.report import report
from hamu_jax.run import rundir
from tests.report import reported


@pytest.fixture(scope="module")
def out(runs, tmp_path_factory):
  """The report of these runs."""
  folder = tmp_path_factory.mktemp("out")
  assert _run(runs, f"--out={folder}") == 0
  return folder


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


def test_the_page_needs_nothing_else(out):
  text = (out / "index.html").read_text()
  page = _Page(text)
  assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
  assert page.links and {link.removeprefix("#") for link in page.links} == set(page.ids)
  assert not re.search(r"https?:|url\(|@import|<script|<link", text)
  assert "b" not in page.tags  # the text of a run is no markup
  assert [row[6] for row in page.rows if row[0] == "hamu-q" and len(row) > 6][0] == "66.67 ± 20.82"
  assert "unfinished: unlearn step 3" in [cell for row in page.rows for cell in row]


def test_the_folder_has_every_format(out):
  names = {path.name for path in out.iterdir()}
  tables = {"results", "losses", "timing", "runs"}
  figures = {"distances", "tradeoff", "tug_of_war", "angle", "branch", "timing"}
  assert names == {
    "index.html",
    "report.md",
    "values.csv",
    *(f"{name}.{kind}" for name in tables for kind in ("csv", "tex")),
    *(f"{name}.{kind}" for name in figures for kind in ("png", "pdf")),
  }
  text = (out / "report.md").read_text()
  assert {name for name in re.findall(r"!\[.*\]\((.*)\)", text)} == {f"{name}.png" for name in figures}


def test_each_dataset_has_a_section_and_a_folder(runs, tmp_path, monkeypatch):
  monkeypatch.setattr(report.figures, "draw", lambda study, folder: [])
  reported.write(tmp_path / "other", data="e" * 64, source="tfds")
  assert _run(runs, tmp_path / "other", f"--out={tmp_path / 'out'}") == 0
  page = _Page((tmp_path / "out" / "index.html").read_text())
  assert page.tags.count("section") == 2
  folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
  assert folders == {"digits", "tfds-uoft-cs-cifar10"}
  assert (tmp_path / "out" / "digits" / "results.csv").exists()


def test_a_truncated_file_is_reported_and_the_rest_used(runs, out, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(report.figures, "draw", lambda study, folder: [])
  assert _run(runs, "--out", tmp_path) == 0
  told = capsys.readouterr()
  note = "metrics.jsonl is truncated: its 1 complete lines are used"
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
    "distances.png",
    "tradeoff.png",
    "tug_of_war.png",
    "angle.png",
    "branch.png",
    "timing.png",
  }
