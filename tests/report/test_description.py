"""Damaged, edited and foreign run directories: whatever they hold, the report notes it and goes on."""

import json

import pytest

from hamu_jax.report import gather
from hamu_jax.report.study_tables import tables
from hamu_jax.report.table import comma_separated, html_table, latex, markdown
from tests.report import directories

VALUES = [
  None,
  {},
  [],
  "x",
  -1,
  True,
  1e999,
  float("nan"),
  10**400,
  [None, [1]],
  {"a": {"b": "c"}},
  "y" * 10**5,
]


def places(value, before=()):
  """Yields the path of every value in nested objects."""
  for name, item in value.items():
    yield (*before, name)
    if isinstance(item, dict):
      yield from places(item, (*before, name))


def put(tree, path, value):
  *sections, name = path
  for section in sections:
    tree = tree[section]
  tree[name] = value


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
  """A folder with two runs, the second of which is to be damaged."""
  folder = tmp_path_factory.mktemp("runs")
  rows = [directories.step(step, angle=[10.0 * step, 3.0], branch=[0, 1]) for step in (1, 2)]
  for name, ratio in (("good", 0.5), ("bad", 0.1)):
    directories.write(folder / name, rows=rows, method__constraint_ratio=ratio)
  return folder


@pytest.fixture
def good(two_runs):
  """The two runs, repaired after the test."""
  files = {path: path.read_bytes() for path in (two_runs / "bad").iterdir() if path.is_file()}
  yield two_runs
  for path, content in files.items():
    path.write_bytes(content)


def short(value):
  return repr(value)[:12]


def write_report(folder):
  """All but the figures, which take long."""
  gathered = gather.gather([folder])
  for study in gather.studies(gathered.runs):
    for table in tables(study):
      for write in (markdown, comma_separated, latex, html_table):
        write(table)
  return gathered


@pytest.mark.parametrize("file", ["summary.json", "config.json"])
def test_the_report_goes_on_whatever_a_value_is(good, file):
  path = good / "bad" / file
  whole = path.read_text()
  everywhere = list(places(json.loads(whole)))
  if file == "config.json":
    read = {
      ("data",),
      ("method",),
      ("method", "name"),
      ("method", "seed"),
      ("model", "name"),
      ("data", "source"),
    }
    everywhere = [
      place for place in everywhere if place in read or place[-1] in ("constraint_ratio", "train_size")
    ]
  for place in everywhere:
    for value in VALUES:
      values = json.loads(whole)
      put(values, place, value)
      path.write_text(json.dumps(values))
      gathered = write_report(good)
      assert "good" in {run.path.name for run in gathered.runs}, (place, value)
  path.write_text(whole)
  assert len(write_report(good).runs) == 2


@pytest.mark.parametrize(
  "text", ["", "{", "[]", "7", "null", "NaN", "[" * 10**5, '{"a":' * 10**5, "\0", '"x"'], ids=short
)
@pytest.mark.parametrize("file", ["summary.json", "config.json", "metrics.jsonl"])
def test_the_report_goes_on_whatever_a_file_is(good, file, text):
  path = good / "bad" / file
  path.write_text(text)
  gathered = write_report(good)
  assert "good" in {run.path.name for run in gathered.runs}
  assert len(gathered.notes) == (0 if (file, text) == ("metrics.jsonl", "") else 1)


@pytest.mark.parametrize("value", [*VALUES, [1.0], [1.0, "x"], [[1.0], [2.0]], [True, False]], ids=short)
def test_diagnostics_of_another_kind_or_length_are_left_out(good, value):
  path = good / "bad" / "metrics.jsonl"
  whole = path.read_text()
  path.write_text(whole + json.dumps(directories.step(3, angle=value)) + "\n")
  (run,) = [run for run in write_report(good).runs if run.path.name == "bad"]
  assert run.diagnostics["angle"][1].shape[1] == 2


def test_names_of_fields_that_leave_the_folder_are_refused(good):
  path = good / "bad" / "config.json"
  whole = path.read_text()
  config = json.loads(whole)
  config["method"]["../../x"] = 1.0
  path.write_text(json.dumps(config))
  (note,) = write_report(good).notes
  assert "is no name of a field - left out" in note
